"""Fira: full-rank training of language models under a low-rank constraint.

One optimizer, in one file that needs nothing but torch. Paper: Chen et al., "Fira: Can We Achieve
Full-rank Training of LLMs Under Low-rank Constraint?", https://arxiv.org/abs/2410.01623.

GaLore (https://arxiv.org/abs/2403.03507) keeps Adam's moments of R = PᵀG, the gradient seen from an
r-dimensional subspace, and throws the rest of the gradient away. Fira uses the rest too: Adam would
scale it much as it scales the part it did see, so each column of the rest is multiplied by
φ = ‖N‖/‖R‖, the factor by which Adam scaled that column inside the subspace:

    W  ←  W − η c_t ( P N  +  S ),        S = φ ∘ (G − P R),       N = M / (√V + ε)

with a limiter that lets ‖S‖ grow by at most a factor γ a step. The state of an m×n matrix is
P (m×r), M and V (r×n) and the number ‖S‖: nothing of size m·n.

    from fira import Fira, param_groups
    optimizer = Fira(param_groups(model, rank=128), lr=1e-2)

Names follow the paper: W weight, G gradient, P projection, R = PᵀG, M and V Adam's moments of R,
N the normalized R, c_t = √(1−β₂ᵗ)/(1−β₁ᵗ), φ scaling factors, S the scaled rest of the gradient.
Matrices are oriented so that P acts on the left: a (m×n), m ≤ n, weight as it is, a tall or square
one transposed. A "column" is a slice along the side that is not projected.
"""

import inspect
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

__all__ = ["Fira", "fira_update", "param_groups", "state_bytes"]

CHOICES = {
    "proj_type": ("std", "reverse_std", "left", "right"),
    "proj_method": ("svd", "subspace", "random"),
    "moments": ("keep", "align", "rotate"),
    "scaling": ("column", "matrix", "unit", None),
    "alpha_mode": ("paper", "unscaled", "released"),
}
FUSED_DEVICES = ("cpu", "cuda", "mps")  # where torch has a fused AdamW
BLOCK = 2**16  # elements in a temporary, where one of a weight's size would be faster


def fira_update(
    W: Tensor,  # (m, n) weight, changed in place
    G: Tensor,  # (m, n) its gradient
    P: Tensor | None,  # (m, r) orthonormal columns; None stands for the identity
    M: Tensor,  # (r, n) first moment of R, changed in place
    V: Tensor,  # (r, n) second moment of R, changed in place
    prev_norm: Tensor,  # () ‖S‖ of the step before, inf if there was none; changed in place
    step_size: Tensor,  # () η c_t; a tensor on the CPU, so that its value is nothing to compile for
    *,
    betas: tuple[float, float],
    eps: float,
    scaling: str | None,  # φ: "column", "matrix", "unit" (φ = 1), None (φ = 0)
    gamma: float | None,  # the limiter's γ
    coefficients: tuple[float, float, float],  # (a_S, a_N, a_R), see `alpha_coefficients`
) -> None:
    """One step of Fira on one matrix (paper, Algorithm 1), without weight decay.

    φ is constant along the projected side, so φ∘(P R) = P (φ∘R), and with s the limiter's factor
    every member of the family is the one line

        W ← W − η c_t [ a_S s φ∘G  +  P (a_N N − a_R s φ∘R) ]

    which needs one multiplication by P, and no temporary of W's size.
    """
    beta1, beta2 = betas
    a_S, a_N, a_R = coefficients

    # 1. Project the gradient. Columns of R lie along memory: that makes this product and their norms faster.
    R = (G if P is None else (G.T @ P).T).to(M.dtype)  # (r, n)
    # 2. Adam in the subspace.
    M.lerp_(R, 1 - beta1)
    V.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    N = M / V.sqrt().add_(eps)  # (r, n)
    if a_S:
        # 3. Norm-based scaling: how much did Adam scale each column?
        R_norms = column_norms(R)  # (n,)
        if scaling == "column":
            phi = column_norms(N) / (R_norms + 1e-8)  # (n,)
        elif scaling == "matrix":
            phi = (column_norms(N).norm() / (R_norms.norm() + 1e-8)).expand_as(R_norms)
        else:
            phi = torch.ones_like(R_norms)
        # 4. Norm-growth limiter. S = φ∘(G − k P R) is never formed: P is orthonormal, so
        #    ‖G_i − k P R_i‖² = ‖G_i‖² − (2k − k²) ‖R_i‖². (Rounding makes that too large where the rest is
        #    below some 3 % of G with 16-bit weights, 0.03 % with float32: then S is held back, being tiny.)
        s = 1.0
        if gamma is not None:
            k = a_R / a_S
            rest_sq = column_norms(G).square_().addcmul_(R_norms, R_norms, value=k * k - 2 * k).clamp_(min=0)
            norm = torch.dot(phi.square(), rest_sq).sqrt()  # ‖S‖
            s = (gamma * (prev_norm + 1e-8) / norm).clamp_(max=1)
            prev_norm.copy_(torch.where(norm > 0, s * norm, prev_norm))  # a zero would cap S at 1e-8 for long
        phi = phi * (s * step_size)
    # 5. The update: P (a_N N − a_R s φ∘R) ...
    if a_N:
        N.mul_(step_size)
        if a_R:
            N.addcmul_(R, phi, value=-a_R / a_N)
        if P is None:
            W.sub_(N, alpha=a_N)
        elif torch.compiler.is_compiling():
            torch.ops.fira.addmm_(W, P, N.to(W.dtype), -a_N)
        else:
            W.addmm_(P, N.to(W.dtype), alpha=-a_N)
    # ... and a_S s φ∘G.
    if a_S:
        W.addcmul_(G, phi.to(W.dtype), value=-a_S)


if not hasattr(torch.ops.fira, "addmm_"):
    # For W.addmm_, torch.compile copies W out and back. An operator that it does not know it calls as it is.
    torch.library.define("fira::addmm_", "(Tensor(a!) W, Tensor P, Tensor N, float alpha) -> ()")

    @torch.library.impl("fira::addmm_", "default")
    def _(W: Tensor, P: Tensor, N: Tensor, alpha: float) -> None:
        W.addmm_(P, N, alpha=alpha)


def alpha_coefficients(group: dict, projected: bool) -> tuple[float, float, float]:
    """(a_S, a_N, a_R) of `fira_update` for a group's options: the factors of φ∘G, of P N and of P (φ∘R)."""
    alpha = group["alpha"]
    if group["only_scaling"]:
        return alpha, 0.0, 0.0
    if group["scaling"] is None or not projected:  # GaLore; or nothing lies outside the subspace, S = 0
        return 0.0, alpha, 0.0
    modes = {"paper": (alpha, alpha, alpha), "unscaled": (1.0, alpha, 1.0), "released": (1.0, alpha, alpha)}
    return modes[group["alpha_mode"]]


def column_norms(X: Tensor) -> Tensor:
    """‖X_i‖ of each column of X (m, n), shape (n,), in at least float32 and without a copy of X."""
    dtype = torch.promote_types(X.dtype, torch.float32)
    if X.device.type != "cpu" or torch.compiler.is_compiling() or (X.stride(0) == 1 and X.dtype == dtype):
        return torch.linalg.vector_norm(X, dim=0, dtype=dtype)
    if X.stride(0) == 1:
        return torch.cat([column_norms(some.to(dtype)) for some in X.split(max(1, BLOCK // max(1, len(X))), dim=1)])
    # Across the rows of memory torch's CPU kernel is slow; block by block this is 4 to 10 times faster.
    sums = X.new_zeros(max(1, BLOCK // X.shape[1]), X.shape[1], dtype=dtype)
    for rows in X.split(len(sums)):
        sums[: len(rows)].addcmul_(rows, rows)
    return sums.sum(0).sqrt_()


def adamw_update(W: list[Tensor], G: list[Tensor], M: list[Tensor], V: list[Tensor], steps: list[Tensor], **options):
    """torch's own AdamW, fused where torch has it; moments of 16-bit weights are kept in float32.

    The kernel wants one dtype for all, so a 16-bit weight is converted in blocks of rows, which keeps
    the temporaries small.
    """
    options |= {"amsgrad": False, "fused": W[0].device.type in FUSED_DEVICES}
    if W[0].dtype == M[0].dtype:
        return adamw(W, G, M, V, [], steps, **options)
    for w, g, m, v, step in zip(W, G, M, V, steps):
        w, g, m, v = map(torch.atleast_1d, (w, g, m, v))
        block = BLOCK if w.device.type == "cpu" else 2**24  # a GPU wants few large kernels
        rows = max(1, block * len(w) // max(1, w.numel())) if w.is_contiguous() else len(w)  # the kernel sees memory
        for w_, g_, m_, v_ in zip(w.split(rows), g.split(rows), m.split(rows), v.split(rows)):
            w32 = w_.to(m.dtype)
            adamw([w32], [g_.to(m.dtype)], [m_], [v_], [], [step.clone()], **options)
            w_.copy_(w32)
        step += 1


def singular_vectors(G: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors of G (m, n), shape (m, rank), largest first; m ≤ n or not.

    They are eigenvectors of the smaller Gram matrix, which is several times faster than an SVD. Squaring
    doubles the digits that are needed, so where σ_r < 0.03 σ_1 it is done in float64.
    """
    if G.shape[0] > G.shape[1]:
        return torch.linalg.qr(G @ singular_vectors(G.T, rank)).Q
    values, vectors = torch.linalg.eigh(G @ G.T)
    if values[-rank] < 1e-3 * values[-1] and G.dtype == torch.float32:
        vectors = torch.linalg.eigh(G.double() @ G.T.double()).eigenvectors.to(G.dtype)
    return vectors[:, -rank:].flip(1)


def subspace_iteration(G: Tensor, P: Tensor, size: float) -> Tensor:
    """P (m, r) after one step of subspace iteration towards the leading left singular vectors of G (m, n).

    `size`, G's largest entry, is divided out before each multiplication, which could overflow.
    """
    Q = torch.linalg.qr(G @ (G.T @ (P / size) / size)).Q
    return Q @ singular_vectors(Q.T / size @ G, P.shape[1])  # Adam works elementwise: vectors, not just their span


def random_projection(m: int, rank: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Q (m, rank) of a seeded Gaussian's QR; drawn on the CPU, so it is the same on every device and process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, rank, dtype=dtype, device="cpu", generator=generator)).Q


def find_projection(G: Tensor, P: Tensor | None, rank: int, proj_method: str, seed: int, size: float) -> Tensor:
    """A new P (m, rank) with orthonormal columns for the gradient G (m, n), after the old P if there is one.

    `size` is G's largest entry in absolute value.
    """
    dtype = torch.promote_types(G.dtype, torch.float32)
    if proj_method == "random":
        return random_projection(G.shape[0], rank, seed, dtype).to(G)
    X = G.to("cpu" if G.device.type == "mps" else G.device, dtype)  # Apple's GPUs have no eigh
    size = max(size, 1e-37)  # float32 can invert it
    if proj_method == "svd":
        P = singular_vectors(X / size, rank)
    elif P is not None:
        P = subspace_iteration(X, P.to(X), size)
    else:
        P = random_projection(G.shape[0], rank, seed, dtype).to(X)
        for _ in range(4):  # more from a random start
            P = subspace_iteration(X, P, size)
    return P.to(G)


def oriented(X: Tensor, proj_type: str) -> Tensor:
    """X with the side that is projected as its rows: X itself, or its transpose."""
    tall = X.shape[0] >= X.shape[1]
    return X.T if {"std": tall, "reverse_std": not tall, "left": False, "right": True}[proj_type] else X


class Fira(torch.optim.Optimizer):
    """Fira and its family; a `torch.optim.Optimizer` in every respect.

    A parameter group with a `rank` must hold matrices; one without is torch's AdamW, fused where torch
    has it. The state of a projected weight, in an orientation with the projected side m first, is
    `projection` (m, r) in the weight's dtype, `exp_avg` and `exp_avg_sq` (r, n), column by column in memory,
    in float32 (float64 for float64 weights), `prev_norm` () and the numbers `step` and `index`, the
    parameter's place. At rank ≥ the short side nothing is projected, and the update is α N (with
    `only_scaling`, α φ∘G). 16-bit weights should be bfloat16: R and the update are computed in the weights'
    dtype, and float16 overflows.

    Args:
        params: parameters or groups; `param_groups(model, rank)` makes the groups for a transformer.
        lr, betas, eps, weight_decay: as in AdamW. In a group with a rank, ε is added to √V before the
            bias correction and the decay comes after the update, as in the authors' release; in one
            without, both are torch's, and the result is that of `torch.optim.AdamW(fused=True)`.
        maximize: ascend instead of descend.

    Group options, which are also defaults here:
        rank: r, or None for plain AdamW.
        update_proj_gap: T; the subspace is chosen anew every T steps.
        alpha: α, GaLore's factor.
        proj_type: which side is projected: "std" the short one, "reverse_std" the long one,
            "left" the rows, "right" the columns.
        proj_method: how P is chosen: "svd", the leading singular vectors of the gradient (the paper's);
            "subspace", one step of subspace iteration towards them from the old P, at a fraction of the
            time; "random", an orthonormal basis from a seed.
        moments: what becomes of M and V when P changes, which they were computed with. None of it depends
            on the signs that a LAPACK happens to give singular vectors.
            "align"  they stay, and each new vector gets the sign with which it points along the old
                     vector in its place.
            "keep"   they stay, as in the authors' release; each vector's largest entry is positive.
            "rotate" M is carried over to the new basis, M ← P_newᵀ P_old M; V stays.
        spread: change the matrices' subspaces one after the other, evenly over the T steps, not all at once.
        scaling: φ: "column" one for each column (Fira), "matrix" one for the matrix (Fira-matrix),
            "unit" 1 (GaLore-add), None 0 (GaLore).
        only_scaling: update by α S alone with S = φ∘G (Fira-only-scaling; with "random": APOLLO).
        gamma: γ of the norm-growth limiter, or None for no limiter.
        alpha_mode: what α multiplies; the paper and its code differ.
            "paper"     α (P N + S), Algorithm 1.
            "unscaled"  α P N + S, Equation 10 with GaLore's α on GaLore's term alone.
            "released"  α P N + φ∘(G − α P R), what the authors' code computes.

    Raises:
        ValueError: an option is out of its range, or a group with a rank holds something else than matrices.
        RuntimeError: a gradient is sparse.
        FloatingPointError: a gradient is not finite in a `step()` that chooses a subspace; no weight was changed.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        rank: int | None = None,
        update_proj_gap: int = 200,
        alpha: float = 0.25,
        proj_type: str = "std",
        proj_method: str = "subspace",
        moments: str = "align",
        spread: bool = False,
        scaling: str | None = "column",
        only_scaling: bool = False,
        gamma: float | None = 1.01,
        alpha_mode: str = "unscaled",
    ):
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def step(self, closure=None):
        """Update every parameter that has a gradient. Returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update((group, group["params"]) for group in self.param_groups)
        return loss

    def step_in_backward(self) -> list:
        """From now on update each parameter as soon as backward has its gradient, and free that gradient.

        The gradients then never exist all at once, and `step()` finds nothing left to do. The weights are
        those of `step()`. It rules out what needs all gradients at once: accumulation over several
        backward passes, clipping by the total norm, a GradScaler, gradients averaged between processes.
        Returns the hooks' handles; `remove()` each to undo it. Call it once.

        Raises:
            RuntimeError: there are several processes.
            FloatingPointError (in backward): as `step()`, but layers nearer the output are updated already.
        """
        processes = torch.distributed
        if processes.is_available() and processes.is_initialized() and processes.get_world_size() > 1:
            raise RuntimeError("step_in_backward() would update before the processes' gradients are averaged")

        def update(number, p):
            self._update([(self.param_groups[number], [p])])
            p.grad = None

        return [
            p.register_post_accumulate_grad_hook(partial(update, number))
            for number, group in enumerate(self.param_groups)
            for p in group["params"]
            if p.requires_grad
        ]

    @torch.compiler.disable  # the work is in `fira_update`, which compiles as a whole
    @torch.no_grad()
    def _update(self, work) -> None:
        work = [(group, [p for p in params if p.grad is not None]) for group, params in work]
        # All that can fail comes first, so that a failure leaves every weight as it was.
        self._change_subspaces([(p, group) for group, params in work for p in params if self._prepare(p, group)])
        for group, params in work:
            if group["rank"] is None:
                self._step_adamw(group, params)
            for p in params if group["rank"] else ():
                self._step_projected(group, p)

    def _prepare(self, p: Tensor, group: dict) -> bool:
        """Make p's state in its first step. Returns whether its subspace is to be chosen now."""
        state, r = self.state[p], group["rank"]
        if p.grad.is_sparse:
            raise RuntimeError(f"Fira takes no sparse gradients: {self._name(p)}")
        dtype = torch.promote_types(p.dtype, torch.float32)  # β₂ = 0.999 would do nothing to a bfloat16 V
        if r is None:
            if not state:
                device = p.device if p.device.type in FUSED_DEVICES else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
            return False
        m, n = oriented(p, group["proj_type"]).shape
        if not state:
            params = [q for group in self.param_groups for q in group["params"]]
            state["index"] = next(i for i, q in enumerate(params) if q is p)
            state["step"] = 0
            R = p.new_empty(n, r).T if r < min(m, n) else oriented(p, group["proj_type"])  # its shape and layout
            state["exp_avg"] = torch.zeros_like(R, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(R, dtype=dtype)
            state["prev_norm"] = p.new_full((), math.inf, dtype=dtype)  # no norm yet: no limit yet
        T, count = group["update_proj_gap"], len(group["params"])
        offset = state["index"] % count * T // count if group["spread"] else 0
        return r < min(m, n) and ("projection" not in state or (state["step"] - offset) % T == 0)

    def _name(self, p: Tensor) -> str:
        number = next(i for i, group in enumerate(self.param_groups) if any(p is q for q in group["params"]))
        return f"the gradient of a parameter of shape {tuple(p.shape)} in group {number}"

    def _change_subspaces(self, due: list[tuple[Tensor, dict]]) -> None:
        @torch.no_grad()  # which holds for one thread
        def find(one):
            p, group = one
            state = self.state[p]
            lowest, highest = torch.aminmax(p.grad)
            size = max(-lowest.item(), highest.item())
            if not math.isfinite(size):
                step = state["step"] + 1
                raise FloatingPointError(f"not finite in step {step}, which chooses its subspace: {self._name(p)}")
            if size == 0:  # there is no direction: the old P stays, or the first one waits
                return None
            G, P = oriented(p.grad, group["proj_type"]), state.get("projection")
            seed = 1_000_003 * state["index"] + state["step"]
            return find_projection(G, P, group["rank"], group["proj_method"], seed, size)

        if len(due) > 1 and all(p.device.type == "cpu" for p, _ in due):
            # A matrix for each core: on one matrix, LAPACK gains little from a second core.
            threads = torch.get_num_threads()
            try:
                with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    found = list(pool.map(find, due))
            finally:
                torch.set_num_threads(threads)  # or all threads to come would start with 1
        else:
            found = [find(one) for one in due]
        for (p, group), P in zip(due, found):
            if P is None:
                continue
            state = self.state[p]
            old = state.get("projection")
            if group["moments"] == "keep":
                P *= P.gather(0, P.abs().argmax(0, keepdim=True)).sign()
            elif old is not None and group["moments"] == "align":
                P *= torch.where((P * old).sum(0) < 0, -1.0, 1.0).to(P)
            elif old is not None:
                M = state["exp_avg"]
                M.copy_(P.T.to(M.dtype) @ old.to(M.dtype) @ M)
            state["projection"] = P.contiguous()

    def _step_adamw(self, group: dict, params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        options = {k: group[k] for k in ("lr", "eps", "weight_decay", "maximize")}
        for kind in {(p.device, p.dtype) for p in params}:  # nearly always one
            same = [p for p in params if (p.device, p.dtype) == kind]
            state = [[self.state[p][k] for p in same] for k in ("exp_avg", "exp_avg_sq", "step")]
            adamw_update(same, [p.grad for p in same], *state, beta1=beta1, beta2=beta2, **options)

    def _step_projected(self, group: dict, p: Tensor) -> None:
        state = self.state[p]
        state["step"] += 1
        lr = float(-group["lr"] if group["maximize"] else group["lr"])
        beta1, beta2 = group["betas"]
        c_t = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        projected = group["rank"] < min(p.shape)
        if "projection" in state or not projected:  # else every gradient was zero so far
            fira_update(
                oriented(p, group["proj_type"]),
                oriented(p.grad, group["proj_type"]),
                state.get("projection"),
                state["exp_avg"],
                state["exp_avg_sq"],
                state["prev_norm"],
                torch.tensor(lr * c_t, dtype=state["exp_avg"].dtype, device="cpu"),
                coefficients=alpha_coefficients(group, projected),
                **{k: group[k] for k in ("betas", "eps", "scaling", "gamma")},
            )
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but the moments keep their own dtype (torch casts all state to the parameter's)."""
        final = {}  # the state as earlier hooks leave it
        hook = self.register_load_state_dict_pre_hook(lambda _, state: final.update(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, saved in zip(self.param_groups, final["param_groups"]):
            for p, number in zip(group["params"], saved["params"]):
                for name, value in final["state"].get(number, {}).items():
                    if isinstance(value, Tensor) and name != "projection":
                        dtype = value.dtype if name == "step" else torch.promote_types(p.dtype, torch.float32)
                        self.state[p][name] = value.to(p.device, dtype, copy=True)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state saved before an option existed
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def check_group(group: dict) -> None:
    """Raise ValueError, with what is wrong, if a parameter group's options or parameters are."""
    at_least_0 = {"lr": group["lr"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
    for name, value in at_least_0.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be a finite number of at least 0")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']} must be two numbers of at least 0 and below 1")
    for name, choices in CHOICES.items():
        if group[name] not in choices:
            raise ValueError(f"{name}={group[name]!r} must be one of {', '.join(map(repr, choices))}")
    for name in ("rank", "update_proj_gap"):
        value = group[name]
        if not (name == "rank" and value is None) and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if not 0 < group["alpha"] < math.inf:
        raise ValueError(f"alpha={group['alpha']} must be a finite number above 0")
    if group["gamma"] is not None and not 1 <= group["gamma"] < math.inf:
        raise ValueError(f"gamma={group['gamma']} must be a finite number of at least 1, or None for no limiter")
    for name in ("only_scaling", "maximize", "spread"):
        if type(group[name]) is not bool:
            raise ValueError(f"{name}={group[name]!r} must be True or False")
    if group["only_scaling"] and group["scaling"] is None:
        raise ValueError("only_scaling=True needs a scaling: with scaling=None nothing would be left of the update")
    for p in group["params"]:
        if hasattr(p, "placements"):  # a DTensor
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is sharded over several processes (FSDP, tensor parallel), and "
                "the projection needs whole matrices: use DistributedDataParallel"
            )
        if not p.is_floating_point():
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is {p.dtype}; Fira takes real floating point only")
        if group["rank"] is not None and p.dim() != 2:
            raise ValueError(
                f"a group with rank={group['rank']} must hold matrices, but has a parameter of shape {tuple(p.shape)}; "
                "use param_groups(model, rank), or put it into a group without a rank"
            )


def param_groups(model: nn.Module, rank: int | None, **options) -> list[dict]:
    """Groups for `Fira`: the matrices of the transformer's blocks projected, all else plain AdamW.

    A block is what an `nn.ModuleList` or `nn.Sequential` of the model holds; its matrices are its 2-D
    parameters, embeddings excepted. Embeddings and the output head outside the blocks are AdamW at the
    same learning rate, as in the authors' release; norms and biases are, too, without weight decay.

    Args:
        rank: r for the matrices; None makes everything AdamW.
        options: further group options for the matrices, such as `alpha=0.25`.
    Raises:
        ValueError: the model has no such matrices, or there is no such option.
    """
    if unknown := options.keys() - (inspect.signature(Fira).parameters.keys() - {"params"}):
        raise ValueError(f"Fira has no option {', '.join(sorted(unknown))}")
    in_blocks, in_embeddings = set(), set()
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            in_blocks.update(module.parameters())
        elif isinstance(module, nn.Embedding):
            in_embeddings.update(module.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() == 2 and p in in_blocks and p not in in_embeddings]
    if not matrices:
        raise ValueError(
            "the model has no nn.ModuleList or nn.Sequential of blocks with matrices in them; "
            'make the groups by hand: [{"params": matrices, "rank": r}, {"params": others}]'
        )
    projected = set(matrices)
    others = [p for p in trained if p.dim() >= 2 and p not in projected]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "rank": rank, **options},
        {"params": others, "rank": None},
        {"params": vectors, "rank": None, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def state_bytes(groups: list[dict]) -> int:
    """Bytes of the tensors that `Fira` keeps for groups that give their `rank`, as `param_groups` makes them.

    For a projected (m, n) matrix that is P (m r), M and V (2 n r) and ‖S‖ (1): the paper's Table 2.
    """
    total = 0
    for group in groups:
        for p in group["params"]:
            moment = max(p.element_size(), 4)
            r = group["rank"]
            if r is None:
                total += 2 * p.numel() * moment + 4  # and the step
            elif r >= min(p.shape):
                total += 2 * p.numel() * moment + moment
            else:
                m, n = oriented(p, group.get("proj_type", "std")).shape
                total += m * r * p.element_size() + (2 * n * r + 1) * moment
    return total
