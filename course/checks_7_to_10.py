"""What the functions of exercises 7 to 10 must do: properties and oracles in float64, at 1e-10."""

import torch

from course.oracles import basis, eye, must, off, randn, size, zeros
from course.short_run import phis


def check_7(its):
    m, n, r = 16, 24, 4
    old, M = basis(m, r, 1), randn(r, n, seed=2)
    new = torch.linalg.qr(old + 0.2 * randn(m, r, seed=3)).Q
    aligned = its.align(new * torch.tensor([1, -1, -1, 1]), old)
    must(aligned.shape == (m, r), f"align gave {size(aligned)}, should give {m}×{r}: what does it return?")
    must(off(aligned.abs(), new.abs()) < 1e-10, "align changed more than signs: what may it do to a vector?")
    against = ((aligned * old).sum(0) < 0).sum()
    must(not against, f"after align {against} of {r} vectors point against the old one: which dot product decides?")
    same = its.align(eye(4)[:, 2:], eye(4)[:, :2])
    must(same.abs().sum() == 2, "a vector at a right angle to the old one became 0, should stay: what is sign(0)?")
    turned, best = its.rotate(M, old, new), torch.linalg.lstsq(new, old @ M).solution
    must(turned.shape == M.shape, f"rotate gave {size(turned)}, should give {r}×{n}: which space is M in?")
    miss, least, stays = ((new @ X - old @ M).norm() for X in (turned, best, M))
    must(
        off(turned, best) < 1e-10,
        f"‖P_new M_new − P_old M‖ is {miss:.2f}, should be {least:.2f}: what is the nearest P_new X to a matrix?",
    )
    yield f"‖P_new M_new − P_old M‖ is {miss:.2f}, the least there is; it would be {stays:.2f} if M stayed"

    def run(how, flip):
        """W after 40 steps of Adam in a subspace that changes every ten, with or without random signs."""
        W, M, V, P, generator = zeros(m, n), zeros(r, n), zeros(r, n), None, torch.Generator().manual_seed(10)
        for t, G in enumerate(randn(40, m, n, seed=4)):
            if t % 10 == 0:
                old, P = P, torch.linalg.svd(G)[0][:, :r]
                P = P * torch.where(torch.rand(r, generator=generator) < 0.5, -1, 1) if flip else P
                M = its.rotate(M, old, P) if t and how == "rotate" else M
                P = its.align(P, old) if t and how == "align" else P
            R = P.T @ G
            M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R.square()
            W = W - P @ (M / (V.sqrt() + 1e-8))
        return W

    raw, align, rotate = (off(run(how, True), run(how, False)) for how in ("raw", "align", "rotate"))
    for how, apart in (("align", align), ("rotate", rotate)):
        must(apart < 1e-10, f"with {how} two runs are {apart:.2f} apart, should be 0: what still depends on a sign?")
    yield f"signs flipped at random: two runs are {raw:.2f} apart raw, {align:.1f} with align, {rotate:.1f} with rotate"


def check_8(its):
    g = randn(64, 256, seed=1)
    sizes = torch.tensor([1e-12, 1.0, 0.0, 1e4], dtype=torch.float64).repeat_interleave(256)
    uneven = torch.cat([g.flatten().square()[:768], sizes, randn(300, seed=2).square()]).view(-1, 4)
    uneven[1, 2] = 0.0  # in a block that has others
    for V in (g.square(), uneven, uneven.float(), torch.tensor([[1e-3, 1.0000001, 0.5]]).double()):
        (codes, scales), n, k = its.pack(V), V.numel(), -(-V.numel() // 256)
        must(codes.dtype == torch.uint8, f"codes are {codes.dtype}, should be uint8: how many bytes is that?")
        must(codes.numel() == n, f"there are {codes.numel()} codes, should be {n}: what was filled with zeros?")
        must(scales.numel() == k, f"{scales.numel()} scales came for {n} numbers, should be {k}: one for each what?")
        must(scales.dtype == torch.float32, f"scales are {scales.dtype}, should be float32: how many bytes is that?")
        back = its.unpack(codes, scales, V.shape)
        must(back.shape == V.shape, f"V of {size(V)} came back as {size(back)}: what is `shape` for?")
        must(back.isfinite().all(), "nan or inf came back: which block can have a scale of 0?")
        back, V = back.double(), V.double()
        lost, worst = ((back == 0) & (V > 0)).double().mean(), ((V.sqrt() + 1e-8) / (back.sqrt() + 1e-8)).max()
        must(
            not lost,
            f"{lost:.2%} of V became 0, an update grew {worst:.1e}-fold; none should. What never rounds to 0?",
        )
        low = (back / V)[V > 0].min()
        must(low > 1 - 1e-6, f"a number came back {low:.3f} times as large, should not shrink: which way do you round?")
        must((back[V == 0] == 0).all(), "a zero did not come back as zero: what should its code be?")
        largest = torch.nn.functional.pad(V.flatten(), (0, -n % 256)).view(-1, 256).amax(1).repeat_interleave(256)[:n]
        error = ((back.sqrt() - V.sqrt()).flatten() / largest.sqrt().clamp(min=1e-300)).max()
        must(error < 1.01 / 255, f"√V is off by {error:.3f} √scale, not 0.004: are 255 steps equal in V or in √V?")
        if V.shape == g.shape:
            linear, root = (((V / V.amax(1, keepdim=True)) ** power * 255).round() == 0 for power in (1, 0.5))
            grew = V[linear].max().sqrt() / 1e-8
            yield f"V linearly: {linear.double().mean():.1%} would become 0, and an update grow {grew:.1e}-fold"
            yield f"√V to nearest: {root.double().mean():.2%} would still become 0; √V as yours: none"
            yield f"√V is off by at most {error * 255:.2f}/255 of its block's largest; 1.016 bytes a number, not 4"


def spectrum(values, n: int):
    """A matrix (len(values), n) with these singular values."""
    m = len(values)
    return basis(m, m) * torch.tensor(values, dtype=torch.float64) @ basis(n, m, seed=1).T


def check_9(its):
    G = spectrum([4, 3, 2, 1, 0.5, 0.25], 8)
    for q, r in ((0.5, 1), (0.9, 3), (0.99, 5), (1.0, 6)):
        for X, what in ((G, ""), (G.T, " of the transposed"), (1e-9 * G, " of all 1e-9 times as large")):
            came = its.rank_for(X, q)
            where = f"singular values 4, 3, 2, 1, 0.5, 0.25{what}, q = {q}: rank {came}, should be {r}"
            must(came == r, f"{where}: is the energy a sum of σ, or of σ²; divided by what?")
    Gs = [randn(12, n, seed=n) @ randn(n, n, seed=n + 1) for n in (12, 20, 40)]
    Gs += [spectrum([9.0, 1, 1, 1, 1, 1], 30), spectrum([1.0] * 6, 9)]
    for X in Gs:
        ranks = [its.rank_for(X, q / 100) for q in range(1, 101)]
        must(ranks == sorted(ranks), f"the rank falls where q grows, {ranks}: which r is the smallest that is enough?")
        must(1 <= ranks[0] and ranks[-1] <= min(X.shape), f"rank {ranks[0]} to {ranks[-1]} of {size(X)}: can that be?")
    yield "singular values 4, 3, 2, 1, 0.5, 0.25: q = 0.5, 0.9, 0.99 give 1, 3, 5; the rank grows with q"

    def cost(ranks):
        return sum(min(X.shape) * r + 2 * max(X.shape) * r + 1 for X, r in zip(Gs, ranks))

    def held(ranks):
        return min(share[r - 1].item() for share, r in zip(shares, ranks))

    shares = [(s := torch.linalg.svdvals(X).square().cumsum(0)) / s[-1] for X in Gs]
    by_q = [[int((s < q - 1e-12).sum()) + 1 for s in shares] for q in (0, *sorted(torch.cat(shares).tolist()))]
    least, some, most = cost(by_q[0]), cost(by_q[len(by_q) // 3]), cost(by_q[-1])
    for budget in (least, least + 100, some, some - 1, (least + most) // 2, most):
        came, best = [int(r) for r in its.ranks_within(list(Gs), budget)], [x for x in by_q if cost(x) <= budget][-1]
        must(len(came) == len(Gs) and min(came) >= 1, f"ranks {came}: are they {len(Gs)}, each at least 1?")
        over = cost(came) - budget
        must(over <= 0, f"ranks {came} are {over:,} numbers too many: is the limiter's one number of each counted?")
        less = f"ranks {came} keep {held(came):.4f} of each matrix, {best} keep {held(best):.4f} for the same budget"
        must(held(came) > held(best) - 1e-9, f"{less}: is your q the largest?")
    try:
        came = its.ranks_within(list(Gs), least - 1)
    except Exception as error:
        must("ValueError" in str(error), f"a budget below rank 1 everywhere should raise ValueError: {error}?")
    else:
        must(False, f"a budget below rank 1 everywhere gave {came}, should raise ValueError: who would notice?")
    half = (least + most) // 2
    yield f"12×12, 12×20, 12×40, 6×30 and 6×9 within {half:,} numbers: ranks {its.ranks_within(list(Gs), half)}"


def check_10(its):
    x = randn(201, seed=1).exp()
    y = x + randn(201, seed=2).exp()
    rho, _ = its.similarity(x**3, x)
    must(abs(rho - 1) < 1e-10, f"rho of x and x³ is {rho:.4f}, should be 1: do you correlate places in the order?")
    places = [(v[:, None] > v).sum(1).double() for v in (x, y)]
    want = 1 - 6 * (places[0] - places[1]).square().sum().item() / (201 * (201**2 - 1))
    rho, level = its.similarity(x, y)
    which = "what does argsort give, the place of each number or the number of each place?"
    must(abs(rho - want) < 1e-10, f"rho is {rho:.4f}, should be {want:.4f}: {which}")
    median = (x / y).median()
    must(
        abs(level - median) < 1e-10,
        f"level is {level:.3f}, not {median:.3f}: is it the median of low / full?",
    )
    rho, level = its.similarity(0.4 * x, x)
    yield f"a vector and 0.4 times itself: rho {rho:.3f}, level {level:.2f}: rho is blind to it"
    for (step, pairs), when in zip(phis(steps=(20, 21), gap=20).items(), ("before", "after")):
        low, full = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        rho, level = its.similarity(low, full)
        of_matrices, _ = its.similarity(*(torch.stack([pair[i].mean() for pair in pairs]) for i in (0, 1)))
        found = f"rho {of_matrices:.3f} of {len(pairs)} matrices, {rho:.3f} of {len(low):,} columns, level {level:.2f}"
        must(of_matrices >= 0.93 and rho >= 0.8, f"step {step}: {found}: why are they below 0.93 and 0.8 here?")
        yield f"step {step}, {when} the subspace changes: {found}"
