"""Fira (Chen et al., arXiv:2410.01623): full-rank training of language models with low-rank optimizer state.

Adam keeps two numbers for every weight. GaLore (arXiv:2403.03507) keeps them for R = PᵀG only, the gradient G seen from
a subspace of r dimensions, and throws the rest of G away. Fira uses the rest too: Adam would scale a column of it much
as it scaled that column inside the subspace. For a weight W (m×n), and P (m×r) with orthonormal columns:

    R   = PᵀG                             the gradient inside the subspace (r×n)
    N   = M / (√V + ε)                    Adam inside the subspace: M and V are the moments of R
    φ_i = ‖N_i‖ / ‖R_i‖                   norm-based scaling: by how much did Adam scale column i?
    S   = φ ∘ (G − P R)                   the rest of the gradient, scaled alike
    S   ← S · min(1, γ ‖S_prev‖ / ‖S‖)    norm-growth limiter: ‖S‖ grows at most by the factor γ in a step
    W   ← W − η c_t (α P N + S)           η is the learning rate, c_t = √(1−β₂ᵗ)/(1−β₁ᵗ) Adam's bias correction

Every T steps P becomes the gradient's r leading singular vectors. The state is P, M, V and ‖S_prev‖: m r + 2 n r + 1
numbers, not Adam's 2 m n. `fira_update` is this mathematics, `Fira.update` a step. Made to be replaced in a subclass:
`inner` with `new_moments` (the optimizer inside), `find_projection`, `change_subspace`; for φ and S, `fira_update`.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

CHOICES = {
    "proj_type": ("std", "reverse_std", "left", "right"),
    "proj_method": ("svd", "subspace", "random"),
    "scaling": ("column", "matrix", "unit", None),
    "alpha_mode": ("unscaled", "paper", "released"),
}
PEERS = {"scale": "alpha", "scale_type": "scaling", "proj": "proj_method", "projection_type": "proj_type"}  # our names


def fira_update(
    W: Tensor,  # (m, n) the weight or its transpose (see `oriented`), changed in place
    G: Tensor,  # (m, n) its gradient
    P: Tensor | None,  # (m, r) orthonormal columns; None stands for the identity
    R: Tensor,  # (r, n) = PᵀG
    N: Tensor,  # (r, n) what the optimizer inside the subspace made of R
    prev_norm: Tensor,  # () s ‖S‖ of the last step that had one, inf before the first; changed in place
    step_size: Tensor,  # () η c_t; a tensor, so that this function, compiled, is not compiled for each value
    scaling: str | None,  # φ: one for each "column", one for the "matrix", or "unit", 1
    gamma: float,  # γ of the limiter
    alpha: float, b: float, k: float,  # factors: of P N, of S, and of P R in S = φ ∘ (G − k P R)
) -> dict:
    """One step on one matrix, W ← W − η c_t (α P N + b s S); s ≤ 1 is what limits S. Returns what a log may show.

    φ has one number for each column, so φ∘(P R) = P (φ∘R). That saves two temporaries of W's size and a product with P:
        α P N + b s S  =  α P N + b s φ∘(G − k P R)  =  P (α N − k b s φ∘R) + b s φ∘G
    """
    inside = N * (alpha * step_size)  # (r, n), in the end η c_t (α N − k b s φ∘R)
    if b:
        # 1. Norm-based scaling (Equations 8 and 9).
        G_norms, R_norms = column_norms(G), column_norms(R)  # (n,)
        if scaling == "column":
            phi = column_norms(N) / (R_norms + 1e-8)  # (n,)
        elif scaling == "matrix":
            phi = (column_norms(N).norm() / (R_norms.norm() + 1e-8)).expand_as(R_norms)
        else:
            phi = torch.ones_like(R_norms)
        # 2. Norm-growth limiter (Equation 12): s ‖S‖ ≤ γ ‖S_prev‖. As P's columns are orthonormal, ‖S‖ needs no S:
        #    ‖G_i − k P R_i‖² = ‖G_i‖² − (2k − k²) ‖R_i‖².
        rest_sq = G_norms.square().addcmul_(R_norms, R_norms, value=k * k - 2 * k)  # (n,)
        rest_sq.masked_fill_(rest_sq <= 9 * torch.finfo(rest_sq.dtype).eps * R_norms.square(), 0.0)  # that is rounding
        norm = torch.dot(phi.square(), rest_sq).sqrt()  # ‖S‖
        s = (gamma * (prev_norm + 1e-8) / norm).clamp(max=1).where(norm.isfinite(), 0.0)  # 1 where S = 0; 0 on overflow
        prev_norm.copy_(torch.where(s * norm > 0, s * norm, prev_norm))  # a stored 0 would hold S down for long
        # 3. The update.
        outside = b * s * step_size * phi  # (n,)
        inside.addcmul_(R, outside, value=-k)
        W.addcmul_(G, outside.to(W.dtype), value=-1)
    if P is None:
        W.sub_(inside)
    elif alpha:
        W.addmm_(P, inside.to(W.dtype), alpha=-1)
    return {"G": G_norms, "R": R_norms, "phi": phi, "S": norm, "limited": s * norm} if b else {}


def column_norms(X: Tensor) -> Tensor:
    """‖X_i‖ of each column of X (m, n), shape (n,), in at least float32 and without a copy of X."""
    dtype = torch.promote_types(X.dtype, torch.float32)
    if X.device.type != "cpu" or torch.compiler.is_compiling() or (X.stride(0) == 1 and X.dtype == dtype):
        return torch.linalg.vector_norm(X, dim=0, dtype=dtype)
    # torch's CPU kernel is slow across the rows of memory, and copies 16-bit tensors: by blocks of rows, then.
    sums = torch.zeros_like(X[: 2**16 // max(1, X.shape[1]) + 1], dtype=dtype)
    for rows in X.split(max(1, len(sums))):
        sums[: len(rows)].addcmul_(rows, rows)
    return sums.sum(0).sqrt_()


def singular_vectors(G: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors of G (m, n), shape (m, rank), largest first."""
    # Eigenvectors of the Gram matrix take a fraction of an SVD's time, but twice the digits: float64 if σ_r < 0.03 σ_1.
    values, vectors = torch.linalg.eigh(G @ G.T)
    if values[-rank] < 1e-3 * values[-1] and G.dtype == torch.float32:
        vectors = torch.linalg.eigh(G.double() @ G.T.double()).eigenvectors.to(G.dtype)
    return vectors[:, -rank:].flip(1)


def oriented(X: Tensor, proj_type: str) -> Tensor:
    """X, or X.T if P is to compress X's other side. For "std" a square or tall X is transposed: its columns, here, are
    then the rows of `nn.Linear.weight` (outputs × inputs), one for each output."""
    tall = X.shape[0] >= X.shape[1]
    return X.T if {"std": tall, "reverse_std": not tall, "left": False, "right": True}[proj_type] else X


class Fira(torch.optim.Optimizer):
    """Fira and its family, as a plain torch optimizer; every option may differ between groups.

    A group with a `rank` holds matrices, one without is torch's AdamW. At rank ≥ the short side nothing is outside the
    subspace: the update is α N, or α φ∘G. Moments are float32 for 16-bit weights; float16 overflows, take bfloat16.
    Raises ValueError for an option, a parameter or a loaded state that cannot be; FloatingPointError, before any weight
    is changed, for a gradient that is not finite where it chooses a subspace.
    """

    def __init__(
        self, params,  # parameters, named parameters, or groups: `param_groups(model, rank)`
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,  # with a rank, added to √V before the bias correction, as in the authors' release
        weight_decay: float = 0.0,  # decoupled (torch's AdamW: 0.01); with a rank, after the update, as there
        *,
        maximize: bool = False,
        rank: int | None = None,  # r; None is AdamW
        update_proj_gap: int = 200,  # T, steps between changes of the subspace
        alpha: float = 0.25,  # α, GaLore's `scale`
        proj_type: str = "std",  # compress the short side; "reverse_std" the long one, "left" rows, "right" columns
        proj_method: str = "subspace",  # a step of subspace iteration from the old P; "svd", the paper's; "random"
        scaling: str | None = "column",  # φ: for each column; Fira-"matrix"; "unit" is 1, GaLore-add; None is 0, GaLore
        only_scaling: bool = False,  # the update is α φ∘G alone (with a random P: APOLLO)
        gamma: float | None = 1.01,  # γ of the limiter; None or inf for no limiter
        alpha_mode: str = "unscaled",  # α P N + S; "paper" α (P N + S); "released" α P N + φ∘(G − α P R), their code
    ):
        super().__init__(params, {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")})
        for group in self.param_groups:
            check_group(group)

    def step(self, closure=None):
        """Update every parameter that has a gradient. Returns the closure's loss, if there is one."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.update()
        return loss

    @torch.compiler.disable  # what can be compiled is `fira_update`
    @torch.no_grad()
    @torch.autocast("cuda", enabled=False)  # or a step inside of autocast would project in 16 bits
    @torch.autocast("cpu", enabled=False)
    def update(self) -> None:
        """Change the subspaces that are due, which may fail and changes no weight; then update each parameter."""
        work = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        due = []
        for p, group in work:
            if p not in self.state:
                check_group(group)  # again: FSDP may have split the parameters since
                self.state[p] = self.new_state(p, group)
            state = self.state[p]
            if "projection" in state and (not state["chosen"] or state["step"] % group["update_proj_gap"] == 0):
                due.append((p, group))
        self.change_subspaces(due)
        self.seen = {}  # by parameter, what `fira_update` returns
        for p, group in work:
            (self.update_adamw if group["rank"] is None else self.update_matrix)(p, group)

    def update_matrix(self, p: Tensor, group: dict) -> None:
        state, alpha = self.state[p], group["alpha"]
        W, G, P = oriented(p, group["proj_type"]), oriented(p.grad, group["proj_type"]), state.get("projection")
        # Columns of R lie along memory, which makes the products with P and the norms faster.
        R = (G if P is None else (G.T @ P).T).to(state["prev_norm"].dtype)
        state["step"] += 1
        N, c_t = self.inner(R, state, group)
        b, k = {"unscaled": (1.0, 1.0), "paper": (alpha, 1.0), "released": (1.0, alpha)}[group["alpha_mode"]]
        a = alpha
        if group["only_scaling"]:
            a, b, k = 0.0, alpha, 0.0
        elif group["scaling"] is None or P is None:  # φ = 0; or nothing is outside the subspace
            b = 0.0
        lr = -group["lr"] if group["maximize"] else group["lr"]
        step_size = torch.as_tensor(lr * c_t, dtype=R.dtype, device=getattr(lr, "device", "cpu"))
        options = {"scaling": group["scaling"], "gamma": group["gamma"] or math.inf, "alpha": a, "b": b, "k": k}
        self.seen[p] = fira_update(W, G, P, R, N, state["prev_norm"], step_size, **options)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    def inner(self, R: Tensor, state: dict, group: dict) -> tuple[Tensor, float]:
        """The optimizer inside the subspace, here Adam: N (r, n) for R (r, n), which it must not change, and c_t."""
        (beta1, beta2), M, V = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        M.lerp_(R, 1 - beta1)
        V.mul_(beta2).addcmul_(R, R, value=1 - beta2)
        return M / V.sqrt().add_(group["eps"]), math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])

    def new_moments(self, R: Tensor) -> dict:
        """What `inner` keeps in the state, for R's shape, dtype and memory layout; R's values mean nothing yet."""
        return {"exp_avg": torch.zeros_like(R), "exp_avg_sq": torch.zeros_like(R)}

    def new_state(self, p: Tensor, group: dict) -> dict:
        dtype, r = torch.promote_types(p.dtype, torch.float32), group["rank"]  # a bfloat16 V would not decay by 0.999
        if r is None:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            return {"step": step} | Fira.new_moments(self, torch.empty_like(p, dtype=dtype))  # not a subclass's
        W = oriented(p, group["proj_type"])
        R = torch.empty_like(W, dtype=dtype)
        state = {"step": 0, "prev_norm": p.new_full((), math.inf, dtype=dtype)}
        if r < min(W.shape):  # P is 0, which makes R 0, until the first gradient that is not 0 chooses it
            state |= {"projection": p.new_zeros(len(W), r), "chosen": False}
            R = p.new_empty(W.shape[1], r, dtype=dtype).T
        return state | self.new_moments(R)

    def change_subspaces(self, due: list[tuple[Tensor, dict]]) -> None:
        @torch.no_grad()  # which holds for one thread
        def find(one):
            (p, group), state = one, self.state[one[0]]
            size = max(x.abs().item() for x in p.grad.aminmax())
            if not math.isfinite(size):
                raise FloatingPointError(f"not finite where it chooses the subspace: gradient of {name_of(p, group)}")
            if size == 0:  # there is no direction: the old P stays
                return state["projection"]
            device = "cpu" if p.device.type == "mps" else p.device  # Apple's GPUs have no eigh
            G = oriented(p.grad, group["proj_type"]).to(device, torch.promote_types(p.dtype, torch.float32)) / size
            P = state["projection"].to(G) if state["chosen"] else None
            return self.find_projection(G, P, state["step"], group)

        # On CPUs a thread for each matrix, begun by set_num_threads(1): on one, LAPACK gains little from a second core.
        with ThreadPoolExecutor(threads := torch.get_num_threads(), "", torch.set_num_threads, (1,)) as pool:
            found = (pool.map if all(p.device.type == "cpu" for p, _ in due) else map)(find, due)
        torch.set_num_threads(threads)  # or all threads to come would start with 1
        for (p, group), P in zip(due, list(found)):
            self.change_subspace(self.state[p], P.to(p), group)
            self.state[p]["chosen"] = bool(P.any())

    def find_projection(self, G: Tensor, P: Tensor | None, step: int, group: dict) -> Tensor:
        """A new P (m, r), orthonormal columns, for G (m, n), of largest entry 1, and the old P. Called in threads."""
        if group["proj_method"] == "random":  # on the CPU, seeded by the step: the same on every device and process
            shape, generator = (len(G), group["rank"]), torch.Generator().manual_seed(step)
            return torch.linalg.qr(torch.randn(shape, dtype=G.dtype, device="cpu", generator=generator)).Q.to(G)
        if group["proj_method"] == "svd" or P is None or not (Y := G.T @ P).any():  # GᵀP = 0: P leads to no other
            return singular_vectors(G, group["rank"])
        Q = torch.linalg.qr(G @ Y).Q  # a step of subspace iteration towards them
        return Q @ singular_vectors(Q.T @ G, group["rank"])  # Adam works elementwise: vectors, not just their span

    def change_subspace(self, state: dict, P: Tensor, group: dict) -> None:
        """Store the new P (m, r). M and V stay, so each of its vectors points along the one that it replaces."""
        signs = torch.where((P * state["projection"]).sum(0) < 0, -1.0, 1.0)  # an SVD's are arbitrary
        state["projection"] = (P * signs.to(P)).contiguous()

    def update_adamw(self, p: Tensor, group: dict) -> None:
        """torch's fused AdamW. Its kernel ignores strides and dtypes: what differs from the moments' is copied."""
        M, V, step = (self.state[p][name] for name in ("exp_avg", "exp_avg_sq", "step"))
        # They are float32 for 16-bit weights, and dense, which a slice or an expanded gradient is not.
        alike = {x: (x.dtype, x.stride()) == (M.dtype, M.stride()) for x in (p, p.grad)}
        w, g = (x if alike[x] else torch.empty_like(M).copy_(x) for x in alike)
        options = {k: group[k] for k in ("lr", "eps", "weight_decay", "maximize")} | {"amsgrad": False, "fused": True}
        adamw([w], [g], [M], [V], [], [step], beta1=group["betas"][0], beta2=group["betas"][1], **options)
        if w is not p:
            p.copy_(w)
        torch.autograd.graph.increment_version(p)  # the kernel does not: a stale graph would go unnoticed

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but tensors keep their own dtype, and a state of other parameters or optimizers is refused."""
        loaded = {}

        def check(_, saved):  # after the caller's own hooks
            groups = [own | new | {"rank": own["rank"]} for own, new in zip(self.param_groups, saved["param_groups"])]
            for own, group in zip(self.param_groups, groups):
                check_group(group | {"params": own["params"]})
                for p, index in zip(own["params"], group["params"]):
                    if index in saved["state"]:
                        loaded[p] = self.restored(saved["state"][index], self.new_state(p, group), name_of(p, own))
            return saved | {"param_groups": groups + saved["param_groups"][len(groups) :]}

        after = self.register_load_state_dict_post_hook(lambda _: self.state.update(loaded), prepend=True)
        with after, self.register_load_state_dict_pre_hook(check):  # `with` removes the hooks
            super().load_state_dict(state_dict)

    def restored(self, saved: dict, state: dict, name: str) -> dict:
        """The fresh state filled with the saved one, whose names and shapes must be the same."""
        here, there = ({k: tuple(getattr(x, "shape", ())) for k, x in s.items()} for s in (state, saved))
        if here != there:
            raise ValueError(f"the saved state of {name} has {there}, but must have {here}")
        for k, x in state.items():
            state[k] = x.copy_(torch.as_tensor(saved[k])) if isinstance(x, Tensor) else type(x)(saved[k])
        return state


def name_of(p: Tensor, group: dict) -> str:  # for errors: its name, where named parameters were passed, and its shape
    i = next(i for i, q in enumerate(group["params"]) if q is p)
    return f"{group['param_names'][i] if 'param_names' in group else f'parameter {i}'} {tuple(p.shape)}"


def check_group(group: dict) -> None:
    """Raise ValueError, with what is wrong, if a group's options or parameters are."""
    torch.optim.AdamW([torch.zeros(1)], **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")})  # checks these
    for name, holds, what in (
        ("rank", group["rank"] is None or 0 < group["rank"] == group["rank"] // 1, "a whole number above 0, or None"),
        ("update_proj_gap", 0 < group["update_proj_gap"] == group["update_proj_gap"] // 1, "a whole number above 0"),
        ("alpha", 0 < group["alpha"] < math.inf, "finite and above 0"),
        ("gamma", group["gamma"] is None or group["gamma"] >= 1, "at least 1, or None for no limiter"),
        ("only_scaling", group["only_scaling"] in (0, bool(group["scaling"])), "False where scaling is None; a bool"),
        *((k, group[k] in some, f"one of {some}") for k, some in [*CHOICES.items(), ("maximize", (True, False))]),
        *((name, name not in group, f"called {ours!r} for Fira") for name, ours in PEERS.items()),
    ):
        if not holds:
            raise ValueError(f"{name}={group[name]!r} must be {what}")
    group["rank"] = group["rank"] and int(group["rank"])  # numpy's would not load again with weights_only=True
    for p in group["params"]:
        if not p.is_floating_point() or group["rank"] and (p.dim() != 2 or hasattr(p, "placements")):  # of a DTensor
            advice = "whole matrices only with a rank: see param_groups (FSDP splits them: use DistributedDataParallel)"
            raise ValueError(f"{name_of(p, group)}: Fira takes real numbers only, and {advice}")


def param_groups(model: nn.Module, rank: int | None, **options) -> list[dict]:
    """Groups for `Fira`: the matrices of the transformer's blocks with a rank and the options, all else AdamW.

    A block is a module with modules in it in an `nn.ModuleList`, or with others of its class in an `nn.Sequential`. Its
    matrices are its 2-D parameters but embeddings. Norms and biases have no weight decay. All else is the optimizer's,
    the learning rate too, as in the authors' release. Raises ValueError if there are no such matrices or options.
    """
    if unknown := options.keys() - Fira.__init__.__annotations__.keys():
        raise ValueError(f"Fira has no option {', '.join(sorted(unknown))}")
    in_blocks, in_embeddings = set(), set()
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            parts = [part for part in module if list(part.children())]
            for part in parts:
                if isinstance(module, nn.ModuleList) or [type(other) for other in parts].count(type(part)) > 1:
                    in_blocks.update(part.parameters())
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            in_embeddings.update(module.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {p: None for p in trained if p.dim() == 2 and p in in_blocks and p not in in_embeddings}
    if not matrices:
        found = "no blocks with matrices (FSDP splits them)" if trained else "no parameter requires a gradient"
        raise ValueError(f'{found}; make groups by hand: [{{"params": matrices, "rank": r}}, {{"params": others}}]')
    groups = [
        {"params": list(matrices), "rank": rank, **options},
        {"params": [p for p in trained if p.dim() >= 2 and p not in matrices], "rank": None},
        {"params": [p for p in trained if p.dim() < 2], "rank": None, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
