"""Another optimizer inside the subspace: SGD with momentum, Adagrad, RMSProp or Lion, instead of Adam.

Sources: the Fira article (arXiv:2410.01623) tries Adagrad and names RMSProp; Lion is arXiv:2302.06675. With R = PᵀG:

    momentum   M ← β₁ M + R                          N = M
    adagrad    V ← V + R²                            N = R / (√V + ε)
    rmsprop    V ← β₂ V + (1 − β₂) R²                N = R / (√V + ε),  c_t = √(1−β₂ᵗ): Adam at β₁ = 0
    lion       N = sign(β₁ M + (1 − β₁) R),  then    M ← β₂ M + (1 − β₂) R

Fira asks of them one number for each column, φ = ‖N‖/‖R‖: how much did they scale it? Two of them have little to say.
- Plain SGD (momentum at β₁ = 0) scales nothing: φ = 1, S = G − P R, and with α = 1 and no limiter Fira is SGD. With
  momentum, φ is near 1/(1−β₁) where a column's gradients agree from step to step, near 1/√(1−β₁²) where they are
  independent. That tells how steady a column is, and nothing of its size.
- Lion makes every entry ±1: ‖N‖ = √r, so φ = √r/‖R‖ divides by this step's norm alone. S gets columns of one size, but
  no memory.
- RMSProp and Adagrad divide by past sizes, which is what φ carries over. Adagrad's falls as 1/√t, and S with it.
LAMB, which the GaLore article names, does not fit here: its factor ‖W‖/‖update‖ needs the weight and the whole update,
and both exist only after φ, the limiter and S. It would be one line in `update_matrix`, outside the subspace.

Costs: half the moments, n r numbers a matrix instead of 2 n r. Each needs a learning rate of its own: N is of size 1
for adagrad, rmsprop and lion, but of the gradient's size for momentum.
"""

from fira import Fira

KINDS = ("momentum", "adagrad", "rmsprop", "lion")


class Inner(Fira):
    def __init__(self, params, *args, kind: str = "adagrad", **options):
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} must be one of {KINDS}")
        super().__init__(params, *args, **options)
        self.defaults["kind"] = kind  # an attribute would be lost by a deepcopy

    def new_moments(self, R):
        name = "exp_avg" if self.defaults["kind"] in ("momentum", "lion") else "exp_avg_sq"
        return {name: super().new_moments(R)[name]}

    def inner(self, R, state, group):
        (beta1, beta2), kind = group["betas"], self.defaults["kind"]
        if kind == "momentum":
            return state["exp_avg"].mul_(beta1).add_(R), 1.0
        if kind == "lion":
            M = state["exp_avg"]
            N = M.lerp(R, 1 - beta1).sign()
            M.lerp_(R, 1 - beta2)
            return N, 1.0
        V = state["exp_avg_sq"]
        V.mul_(1.0 if kind == "adagrad" else beta2).addcmul_(R, R, value=1.0 if kind == "adagrad" else 1 - beta2)
        return R / V.sqrt().add_(group["eps"]), 1.0 if kind == "adagrad" else (1 - beta2 ** state["step"]) ** 0.5
