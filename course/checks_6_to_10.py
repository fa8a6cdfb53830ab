"""What the functions of exercises 6 to 10 must do: properties and oracles in float64, at 1e-10."""

import math

import torch

from course.oracles import basis, must, off, randn, same
from course.training import phis
from fira import Fira


def check_6(state_numbers, break_even):
    for m, n, r in ((24, 40, 8), (40, 24, 8), (24, 24, 4), (24, 40, 24), (24, 40, 30)):
        w = torch.nn.Parameter(torch.ones(m, n))
        w.grad, optimizer = torch.ones(m, n), Fira([w], rank=r)
        optimizer.step()
        held = [x.numel() for x in optimizer.state[w].values() if isinstance(x, torch.Tensor)]
        came = f"{m}×{n}, rank {r}: {state_numbers(m, n, r)} came out, Fira holds {sum(held)} (in tensors of {held})"
        must(state_numbers(m, n, r) == sum(held), f"{came}: which of P, M, V and ‖S_prev‖ are yours?")
    yield f"as many as Fira holds, tall ones and r = m too; at 512×512 and r = 128 {state_numbers(512, 512, 128):,}"
    for m, n in ((512, 512), (512, 1376), (1376, 512)):
        r, adam = break_even(m, n), 2 * m * n
        count = r * (min(m, n) + 2 * max(m, n))
        came, error = f"{m}×{n}: at rank {r:.1f} P, M and V are {count:,.0f} numbers", count / adam - 1
        question = "which side is the short one?" if m != n else "which of P, M and V has which sides?"
        question = "is that a rank, or a share of the side?" if r < 2 else question
        question = "is it rounded, or is ‖S_prev‖ counted?" if abs(error) < 0.005 else question
        must(abs(error) < 1e-10, f"{came}, should be {adam:,}, as Adam's: {question}")
        yield f"{came}, as Adam's: rank {math.floor(r)} still saves, {math.floor(r) + 1} does not"


def check_7(align, rotate):
    m, n, r = 16, 24, 4
    old, M = basis(m, r, 1), randn(r, n, seed=2)
    new = torch.linalg.qr(old + 0.2 * randn(m, r, seed=3)).Q
    for P in (new * torch.tensor([1, -1, -1, 1]), *(basis(m, r, seed) for seed in range(2, 8))):  # near, and far
        aligned = align(P, old)
        whole, against = P * (aligned * P).sum(0).sign(), ((aligned * old).sum(0) < 0).sum()
        same(aligned, whole, "a vector after align, beside P's or its reverse,", "what may align do but reverse it?")
        must(not against, f"after align {against} of {r} vectors point against the old one: which dot product decides?")
    kept = align(torch.eye(4).double()[:, 2:], torch.eye(4).double()[:, :2]).abs().sum()
    must(kept == 2, "a vector at a right angle to the old one became 0, should stay: what is sign(0)?")
    turned, best = rotate(M, old, new), torch.linalg.lstsq(new, old @ M).solution
    shapes = f"M_new is {tuple(turned.shape)}, should be {tuple(M.shape)}"
    must(turned.shape == M.shape, f"{shapes}: along which vectors does M count?")
    miss, least, stays = ((new @ X - old @ M).norm() for X in (turned, best, M))
    distance = f"‖P_new M_new − P_old M‖ is {miss:.2f}"
    must(off(turned, best) < 1e-10, f"{distance}, should be {least:.2f}: what is the nearest P_new X to a matrix?")
    yield f"{distance}, the least there is; it would be {stays:.2f} if M stayed"

    def run(how, flip):
        """W after 40 steps of Adam in a subspace that changes every ten, with or without random signs."""
        W, M, V, P = 0 * randn(m, n), 0 * randn(r, n), 0 * randn(r, n), None
        for t, G in enumerate(randn(40, m, n, seed=4)):
            if t % 10 == 0:
                new = torch.linalg.svd(G)[0][:, :r] * (randn(r, seed=t + 8).sign() if flip else 1)
                M = rotate(M, P, new) if t and how == "rotate" else M
                P = align(new, P) if t and how == "align" else new
            R = P.T @ G
            M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
            W = W - P @ (M / (V.sqrt() + 1e-8))
        return W

    raw = off(run("raw", True), run("raw", False))
    for how in ("align", "rotate"):
        same(run(how, True), run(how, False), f"W of a run with {how}, and random signs,", "what depends on a sign?")
    yield f"signs flipped at random: two runs are {raw:.2f} apart, 0.0 with align or with rotate"


def check_8(pack, unpack):
    g, uneven = randn(64, 256, seed=1).square(), randn(1300, seed=2).square()
    uneven[256:1024] *= torch.tensor([1e-12, 0.0, 1e4]).double().repeat_interleave(256)  # a block each
    uneven[6] = 0.0  # in a block that has others
    for V in (g, uneven.view(-1, 4), torch.tensor([[1e-3, 1.00000001, 0.5]], dtype=torch.float64)):
        (codes, scales), n, root = pack(V), V.numel(), V.sqrt()
        came = f"{codes.numel()} codes of {codes.dtype} and {scales.numel()} scales of {scales.dtype}"
        want = f"{n} codes of torch.uint8 and {-(-n // 256)} scales of torch.float32"
        question = "how many blocks are there, and what did `blocks` add?"
        must(came == want, f"{came} came for {n} numbers, should be {want}: {question}")
        back = unpack(codes, scales, V.shape).double()
        must(back.shape == V.shape, f"V of {tuple(V.shape)} came back as {tuple(back.shape)}: what is `shape` for?")
        lost, grew = ((back == 0) & (V > 0)).double().mean(), ((root + 1e-8) / (back.sqrt() + 1e-8)).max()
        growth = f"{grew:.3g}-fold" if grew > 1.5 else f"by {grew - 1:.2%}"
        sentence = f"{lost:.2%} of V came back as 0, and an update grew {growth}, should not grow"
        question = "what is 256 in a byte?" if n == 3 else "which way do you round, is a scale 0, is 255 the largest?"
        must(grew < 1 + 1e-6, f"{sentence}: {question}")
        must((back[V == 0] == 0).all(), "a zero did not come back as zero: what should its code be?")
        for x, y in zip(root.flatten().split(256), back.sqrt().flatten().split(256)):
            error = (y - x).abs().max() / x.max().clamp(min=1e-30)
            must(error < 1.01 / 255, f"√V is off by {error:.3f} √scale, not 0.004: are 255 steps equal in V or in √V?")
    plain, of_root = (((g / g.amax(1, keepdim=True)) ** power * 255).round() == 0 for power in (1, 0.5))
    grew = g[plain].max().sqrt() / 1e-8
    yield f"V linearly, to nearest: {plain.double().mean():.1%} would become 0, and an update grow {grew:.1e}-fold"
    yield f"√V to nearest: {of_root.double().mean():.2%} would still become 0; yours: none. 1.016 bytes a number, not 4"


def check_9(rank_for, ranks_within):
    G = basis(6, 6) * torch.tensor([4, 3, 2, 1, 0.5, 0.25], dtype=torch.float64) @ basis(8, 6, seed=1).T
    for X, q, r in ((X, q, r) for X in (G, G.T) for q, r in ((0.5, 1), (0.9, 3), (0.99, 5), (1.0, 6))):
        must(rank_for(X, q) is not None, f"rank_for returned None for q = {q}: what if the last energy is 0.9999999?")
        came = f"singular values 4, 3, 2, 1, 0.5, 0.25, q = {q}: rank {rank_for(X, q)}, should be {r}"
        question = "is yours a sum of σ, or of σ², and which rank is the first that is enough?"
        must(rank_for(X, q) == r, f"{came} (ranks 1 to 4 hold 0.528, 0.825, 0.957, 0.990): {question}")
    even = rank_for(torch.eye(4, dtype=torch.float64), 0.5)
    must(even == 2, f"four equal singular values, q = 0.5: rank {even}, should be 2: is just enough enough?")
    Gs = [G, *(randn(12, n, seed=n) @ randn(n, n, seed=n + 1) for n in (12, 20, 40))]
    for X in (*Gs, basis(9, 6)):
        ranks = [int(rank_for(X, q / 100)) for q in range(1, 101)]
        of, most = f"of {tuple(X.shape)}", min(X.shape)
        must(ranks[-1] <= most, f"q = 1 gives rank {ranks[-1]} {of}: what if the last energy is 0.9999999?")
        fine = ranks == sorted(ranks) and 1 <= ranks[0]
        must(fine, f"q from 0.01 to 1 gives ranks {ranks} {of}: which r is the smallest that is enough?")
    yield "singular values 4, 3, 2, 1, 0.5, 0.25: q = 0.5, 0.9, 0.99 give 1, 3, 5; the rank grows with q"

    def cost(ranks):
        return sum(min(X.shape) * r + 2 * max(X.shape) * r + 1 for X, r in zip(Gs, ranks))

    energies = [(s := torch.linalg.svdvals(X).square().cumsum(0)) / s[-1] for X in Gs]
    by_q = [[int((e < q - 1e-12).sum()) + 1 for e in energies] for q in sorted(torch.cat(energies).tolist())]
    for budget in (cost(by_q[-1]), cost(by_q[9]), cost(by_q[9]) - 1, 1500):
        came, best = [int(r) for r in ranks_within(list(Gs), budget)], [x for x in by_q if cost(x) <= budget][-1]
        sentence = f"{cost(came):,} numbers for ranks {came}, should be {cost(best):,} of {budget:,} for {best}"
        must(cost(came) <= budget, f"{sentence}: is it of the last q that fits, and all of `numbers` counted?")
        question = "do all ranks come from one q?" if cost(came) > cost(best) else "is your q the largest?"
        must(came == best, f"{sentence}: {question}")
    yield f"{', '.join(str(tuple(X.shape)) for X in Gs)} within {budget:,} numbers: ranks {best}"
    try:
        came = ranks_within(list(Gs), cost([1] * len(Gs)) - 1)
    except ValueError:
        return
    must(False, f"a budget below rank 1 everywhere gave {came}, should raise ValueError: who would know?")


def check_10(similarity):
    x = randn(201, seed=1).exp()
    y = x + randn(201, seed=2).exp()
    a, b = ((v[:, None] > v).sum(1).double() for v in (x, y))
    want, median = 1 - 6 * (a - b).square().sum() / (201**3 - 201), (x / y).median()  # Spearman's own formula
    rho, level = similarity(x, y)
    question = "do you correlate places in the order? (argsort once gives the number of each place.)"
    must(abs(rho - want) < 1e-4, f"rho is {rho:.4f}, should be {want:.4f}: {question}")  # float32 will do
    must(abs(level - median) < 1e-4, f"level is {level:.3f}, not {median:.3f}: is it the median of low / full?")
    yield "a vector and 0.4 times itself: rho {:.3f}, level {:.2f}: rho is blind to it".format(*similarity(0.4 * x, x))
    for step, *phi in phis():
        rho, level = similarity(*map(torch.cat, phi))
        of_means, _ = similarity(*(torch.stack([columns.mean() for columns in matrices]) for matrices in phi))
        when = "before" if step == 20 else "after"
        found = f"{when} the subspace changes rho is {of_means:.3f} (matrices), {rho:.3f} (columns), level {level:.2f}"
        must(of_means >= 0.93 and rho >= 0.8, f"{found}: why are they below 0.93 and 0.8 here?")
        yield found
