"""What the functions of exercises 6 to 10 must do: properties and oracles in float64, at 1e-10."""

import torch

from course.oracles import basis, moments, must, off, randn, size
from fira import Fira


def check_6(its):
    for m, n, r in ((24, 40, 8), (40, 24, 8), (24, 24, 4), (24, 40, 24)):
        w = torch.nn.Parameter(torch.zeros(m, n))
        w.grad = torch.ones(m, n)
        optimizer = Fira([w], rank=r)
        optimizer.step()
        state = {name: x.numel() for name, x in optimizer.state[w].items() if isinstance(x, torch.Tensor)}
        count, came = sum(state.values()), its.state_numbers(m, n, r)
        names = {"projection": "P", "exp_avg": "M", "exp_avg_sq": "V", "prev_norm": "‖S_prev‖"}
        parts = ", ".join(f"{names[name]} {number}" for name, number in sorted(state.items(), key=lambda x: -x[1]))
        must(came == count, f"{m}×{n} at rank {r}: {came} came out, Fira holds {count} ({parts}). Which of these is yours?")
    yield f"as many as Fira holds, also for tall matrices and for r = m; at 512×512 and r = 128 {its.state_numbers(512, 512, 128):,}"
    for m, n, say in ((512, 512, 341), (512, 1376, 432), (1376, 512, 432)):
        came, short, long = its.break_even(m, n), min(m, n), max(m, n)
        fira, adam = came * (short + 2 * long), 2 * m * n
        must(abs(fira / adam - 1) < 0.002, f"at {m}×{n} r* came out {came:.1f}; P, M and V are {fira:,.0f} numbers there, Adam's "
             f"{adam:,}, should be equal: on which side of the equation is r?")
        yield f"{m}×{n}: no more saving from rank {came:.1f} on, that is {say}"


def run_7(its, how: str, flips: int | None):
    """W after 40 steps of Adam in a subspace that changes every ten; `flips` seeds the signs of its vectors."""
    Gs, W, P, t = randn(40, 16, 24, seed=4), torch.zeros(16, 24, dtype=torch.float64), None, 0
    generator = torch.Generator().manual_seed(flips or 0)
    M = V = torch.zeros(4, 24, dtype=torch.float64)
    for t, G in enumerate(Gs):
        if t % 10 == 0:
            new = torch.linalg.svd(G)[0][:, :4]
            if flips is not None:
                new = new * torch.where(torch.rand(4, generator=generator) < 0.5, -1, 1)
            if P is not None and how == "rotate":
                M = its.rotate(M, P, new)
            P = its.align(new, P) if P is not None and how == "align" else new
        R = P.T @ G
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R.square()
        W = W - P @ (M / (V.sqrt() + 1e-8))
    return W


def check_7(its):
    m, n, r = 16, 24, 4
    old, M = basis(m, r, 1), randn(r, n, seed=2)
    new = torch.linalg.qr(old + 0.2 * randn(m, r, seed=3)).Q
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64) * (new * old).sum(0).sign()
    aligned = its.align(new * signs, old)
    must(aligned.shape == (m, r), f"align gave {size(aligned)}, should give {m}×{r}")
    must((aligned.abs() - new.abs()).abs().max() < 1e-10, "align changed more than signs: may it make other vectors of them?")
    dots = (aligned * old).sum(0)
    must((dots >= 0).all(), f"after align {(dots < 0).sum()} of {r} vectors point against the one they replace: which dot product decides, and for which column?")
    zero = its.align(torch.eye(4, dtype=torch.float64)[:, 2:], torch.eye(4, dtype=torch.float64)[:, :2])
    must(zero.abs().sum() == 2, "a vector at a right angle to the old one became 0, should stay: what is sign(0)?")
    turned = its.rotate(M, old, new)
    must(turned.shape == M.shape, f"rotate gave {size(turned)}, should give {r}×{n}")
    best, miss = torch.linalg.lstsq(new, old @ M).solution, (new @ turned - old @ M).norm()
    must(off(turned, best) < 1e-10, f"‖P_new M_new − P_old M‖ is {miss:.2f}, {(new @ best - old @ M).norm():.2f} is possible: "
         "for a P with orthonormal columns, what is the nearest P_new X to a matrix?")
    yield f"‖P_new M_new − P_old M‖ is {miss:.2f}, the least that is possible, and is {(new @ M - old @ M).norm():.2f} if M stays"
    apart = {how: off(run_7(its, how, flips=1), run_7(its, how, None)) for how in ("raw", "align", "rotate")}
    for how in ("align", "rotate"):
        must(apart[how] < 1e-10, f"two runs whose P's differ in signs are {apart[how]:.2f} apart with {how}, should be 0: what depends on a sign?")
    yield f"signs flipped at random: two runs are {apart['raw']:.2f} apart raw, {apart['align']:.1f} with align, {apart['rotate']:.1f} with rotate"


def check_8(its):
    g = randn(64, 256, seed=1)
    linear = (g.square() / g.square().amax(1, keepdim=True) * 255).round() == 0
    grew = (g.abs()[linear].max() + 1e-8) / 1e-8
    root = (g.abs() / g.abs().amax(1, keepdim=True) * 255).round() == 0
    known = f"{linear.double().mean():.1%} of V would be 0 if kept linearly, and an update grow {grew:.1e}-fold"
    sizes = torch.cat([torch.full((256,), x, dtype=torch.float64) for x in (1e-12, 1.0, 0.0, 1e4)])
    many = torch.cat([g.flatten().square()[:900], sizes, torch.rand(300, dtype=torch.float64)]).view(-1, 4)
    for V in (g.square(), many, many.float(), torch.tensor([[1e-3, 1.0000001, 0.5]]).double()):
        (codes, scales), n = its.pack(V), -(-V.numel() // 256)
        must(codes.dtype == torch.uint8, f"codes are {codes.dtype}, should be uint8: how many bytes is that?")
        must(codes.numel() == V.numel(), f"there are {codes.numel()} codes, should be {V.numel()}: what was filled with zeros?")
        must(scales.numel() == n, f"there are {scales.numel()} scales for {V.numel()} numbers, should be {n}: what is the largest number of each block?")
        must(scales.dtype == torch.float32, f"scales are {scales.dtype}, should be float32: how many bytes a block?")
        back = its.unpack(codes, scales, V.shape)
        must(back.shape == V.shape, f"V of {size(V)} came back as {size(back)}")
        must(back.isfinite().all(), "there are nan or inf in what came back: which block can a scale of 0 have?")
        back, V = back.double(), V.double()
        zeros = ((back == 0) & (V > 0)).double().mean()
        worst = ((V.sqrt() + 1e-8) / (back.sqrt() + 1e-8)).max()
        must(zeros == 0, f"{zeros:.2%} of V became 0, and an update grew {worst:.1e}-fold, should not at all: what is the smallest number that does not round to 0?")
        must((back >= V * (1 - 1e-6)).all(), f"a number came back as {(back / V.clamp(min=1e-300))[V > 0].min():.3f} of what it was, should never be smaller: which way do you round?")
        must((back[V == 0] == 0).all(), f"a zero came back as {back[V == 0].max() if (V == 0).any() else 0:.1e}: what should its code be?")
        scale = torch.nn.functional.pad(V.flatten(), (0, -V.numel() % 256)).view(-1, 256).amax(1).repeat_interleave(256)
        error = ((back.sqrt() - V.sqrt()).flatten() / scale[: V.numel()].sqrt().clamp(min=1e-300)).max()
        must(error < 1.01 / 255, f"√V is off by {error:.3f} √scale, should be at most 1/255 = 0.004: are there 255 equal steps in V, or in √V?")
    yield f"{known}; in √V to nearest still {root.double().mean():.2%} would be 0, and none with yours"
    yield f"√V is off by at most {error * 255:.2f}/255 of the block's largest; a number takes {1 + 4 / 256:.3f} bytes, not 4"


def spectrum(values, n: int = 8, seed: int = 0):
    return basis(len(values), len(values), seed) * torch.tensor(values, dtype=torch.float64) @ basis(n, len(values), seed + 1).T


def check_9(its):
    G = spectrum([4, 3, 2, 1, 0.5, 0.25])
    for q, r in ((0.5, 1), (0.9, 3), (0.99, 5), (1.0, 6)):
        came = its.rank_for(G, q)
        must(came == r, f"singular values 4, 3, 2, 1, 0.5, 0.25 and q = {q}: rank {came} came out, should be {r}: is the energy a sum of σ, or of σ²; of all, or of the rest?")
        must(its.rank_for(G.T, q) == r, f"for the transposed matrix rank_for is {its.rank_for(G.T, q)}, should be {r} as well: which side did you use?")
        must(its.rank_for(1e-9 * G, q) == r, f"for 1e-9 G rank_for is {its.rank_for(1e-9 * G, q)}, should be {r} as well: is the share of all the energy?")
    Gs = [randn(12, n, seed=n) @ randn(n, n, seed=n + 1) for n in (12, 20, 40)] + [spectrum([9.0, 1, 1, 1, 1, 1], 30), spectrum([1.0] * 6, 9)]
    ranks = [[its.rank_for(G, q / 100) for q in range(1, 101)] for G in Gs]
    must(all(a <= b for row in ranks for a, b in zip(row, row[1:])), "rank_for falls where q grows: which r is the smallest that is enough?")
    must(all(1 <= r <= min(G.shape) for row, G in zip(ranks, Gs) for r in row), "a rank is below 1 or above the short side: what is the share of rank m, with rounding?")
    yield "singular values 4, 3, 2, 1, 0.5, 0.25: q = 0.5, 0.9, 0.99 give 1, 3, 5; the rank grows with q"
    cost = lambda ranks: sum(min(G.shape) * r + 2 * max(G.shape) * r + 1 for G, r in zip(Gs, ranks))  # noqa: E731
    shares = [(s := torch.linalg.svdvals(G).square().cumsum(0)) / s[-1] for G in Gs]
    least, most = cost([1] * 5), cost([min(G.shape) for G in Gs])
    some = cost([int((share < 0.8).sum()) + 1 for share in shares])
    for budget in (least, least + 100, some, some - 1, (least + most) // 2, most):
        came = [int(r) for r in its.ranks_within(list(Gs), budget)]
        must(len(came) == 5, f"there are {len(came)} ranks for 5 matrices")
        must(min(came) >= 1, f"the ranks are {came}, should be at least 1")
        must(cost(came) <= budget, f"ranks {came} need {cost(came) - budget:,} numbers more than the budget of {budget:,}: is the limiter's one number of each counted?")
        qs = sorted({x for share in shares for x in share.tolist()})
        best = [[1] * 5] + [r for q in qs if cost(r := [int((share < q - 1e-12).sum()) + 1 for share in shares]) <= budget]
        held = lambda ranks: min(share[r - 1].item() for share, r in zip(shares, ranks))  # noqa: E731
        must(held(came) >= held(best[-1]) - 1e-9, f"with ranks {came} a matrix keeps only {held(came):.4f} of its energy; the same budget of {budget:,} "
             f"allows {held(best[-1]):.4f} for each, with {best[-1]}: is your q the largest?")
    try:
        came = its.ranks_within(list(Gs), least - 1)
    except Exception as error:
        must("ValueError" in str(error), f"a budget below rank 1 everywhere must raise ValueError, but: {error}")
    else:
        must(False, f"a budget below rank 1 everywhere gave {came}, should raise ValueError: who would notice the memory?")
    half = (least + most) // 2
    yield f"{len(Gs)} matrices (12×12, 12×20, 12×40, 6×30, 6×9) within {half:,} numbers: ranks {its.ranks_within(list(Gs), half)}"


def check_10(its):
    x, y = randn(201, seed=1).exp(), randn(201, seed=2).exp()
    y = x + y
    rho, _ = its.similarity(x**3, x)
    must(abs(rho - 1) < 1e-10, f"rho of a vector and its cubes came out {rho:.4f}, should be 1: is it the places in the order that you correlate?")
    places = [(v[:, None] > v).sum(1).double() for v in (x, y)]
    want = 1 - 6 * (places[0] - places[1]).square().sum().item() / (201 * (201**2 - 1))
    rho, level = its.similarity(x, y)
    must(abs(rho - want) < 1e-10, f"rho came out {rho:.4f}, should be {want:.4f}: what does `argsort` give, the place of each number or the number of each place?")
    must(abs(level - (x / y).median()) < 1e-10, f"level came out {level:.4f}, should be {(x / y).median():.4f}: is it the median of low / full, not full / low, not a mean?")
    yield f"rho of a vector with 0.4 times itself is {its.similarity(0.4 * x, x)[0]:.3f}, its level {its.similarity(0.4 * x, x)[1]:.2f}: rho is blind to it"
    from course.similarity import phis

    for step, pairs in phis(steps=(20, 21), gap=20).items():
        columns = [torch.cat([pair[i] for pair in pairs]) for i in (0, 1)]
        matrices = [torch.stack([pair[i].mean() for pair in pairs]) for i in (0, 1)]
        (rho_m, _), (rho, level) = its.similarity(*matrices), its.similarity(*columns)
        must(rho_m >= 0.93 and rho >= 0.8, f"at step {step} rho is {rho_m:.3f} over matrices and {rho:.3f} over columns: the claim does not hold here. Why?")
        when = "before" if step == 20 else "after"
        yield f"step {step}, {when} the subspace changes: rho {rho_m:.3f} over {len(pairs)} matrices, {rho:.3f} over {len(columns[0]):,} columns; level {level:.2f}"
