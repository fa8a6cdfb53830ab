"""What the functions of exercises 4 to 6 must do: properties and oracles in float64, at 1e-10."""

import torch

from course.oracles import Inner, basis, eye, moments, must, off, randn, size, zeros
from fira import Fira


def check_4(its):
    m, n, r = 8, 12, 3
    N, R = randn(r, n, seed=1), randn(r, n, seed=2)
    phi, want = its.scaling(N, R), N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
    must(phi.numel() != r, f"φ has {r} numbers, one for each row, not {n}: over which dimension is a column's norm?")
    must(phi.numel() != 1, f"φ is one number, should be {n}: that is the paper's Fira-matrix. Which `dim` has {n}?")
    must(phi.shape in ((n,), (1, n)), f"φ is {size(phi)}, should be one for each of {n} columns: is it elementwise?")
    phi = phi.flatten()
    must(off(phi, 1 / want) > 1e-6, "φ is upside down: a column that is doubled inside must get 2. Which ratio is 2?")
    must(off(phi, want.square()) > 1e-6, "a column that is tripled inside got 9, should get 3. Is a root missing?")
    must(off(phi, want) < 1e-7, f"φ is off by {off(phi, want):.1e}: is it ‖Nᵢ‖ / (‖Rᵢ‖ + ε), with the 2-norm?")
    zero = its.scaling(0 * N, 0 * R)
    must(zero.isfinite().all(), f"columns of zeros got φ = {zero.flatten()[0]:.3g}, should be finite: what is ε for?")
    with_one = off(its.scaling(N, R, eps=1.0).flatten(), N.norm(dim=0) / (R.norm(dim=0) + 1))
    must(with_one < 1e-10, f"with ε = 1 φ is off by {with_one:.1e}: where does ε stand?")

    def run(kind, P):
        W, inner = zeros(m, n), Inner(kind)
        for G in randn(30, m, n, seed=9):
            R = P.T @ G
            N = inner(R)
            W = W - 0.01 * (P @ N + its.scaling(N, R, eps=1e-30) * (G - P @ R))
        return W

    P = basis(m, 2, seed=7)
    sgd, momentum, adam = (off(run(kind, P), run(kind, eye(m))) for kind in ("SGD", "momentum", "Adam"))
    must(sgd < 1e-10, f"with SGD inside it is off SGD for the full matrix by {sgd:.1e}: what must φ be where N = R?")
    yield f"SGD inside is SGD, for any P (off by {100 * (run('SGD', P) - run('SGD', eye(m))).abs().max():.0e})"
    yield f"momentum inside is not momentum (off by {momentum:.2f}): what does S lack that P N has?"
    yield f"Adam inside is Adam where P = I, for then S = 0; for this P (8×2) it is off by {adam:.2f}"


def check_5(its):
    S = randn(8, 12, seed=1)
    norm, was = S.norm().item(), "‖S‖ of the first step"
    new, kept = its.limit(S, None)
    must(off(new, S) < 1e-10, f"{was}, {norm:.3g}, became {new.norm():.3g}, should stay: what is it compared with?")
    must(kept is not None and abs(kept - norm) < 1e-9, f"{was} is {norm:.4g}, but {kept} was kept: for whom is it?")
    new, kept = its.limit(S, 10 * norm)
    must(off(new, S) < 1e-10, f"‖S‖ fell to a tenth, but × {new.norm() / norm:.3g} came out: what is the max for?")
    new, kept = its.limit(S, norm / 57.3)
    grew = new.norm().item() / norm * 57.3
    question = "Is it compared with the step before?" if grew > 50 else "What is γ multiplied by?"
    must(abs(grew - 1.01) < 1e-6, f"after the spike ‖S‖ grew by {grew:.4g}; the limiter allows 1.01. {question}")
    must(off(new / new.norm(), S / norm) < 1e-10, "S points another way: is every number multiplied by one factor?")
    grew = kept / norm * 57.3
    must(
        abs(grew - 1.01) < 1e-6,
        f"a spike's second step may be × {grew * 1.01:.3g}, not 1.02: which norm did you store?",
    )
    new, kept = its.limit(0 * S, 3.0)
    must(new.norm() == 0, f"zeros came out with norm {new.norm():.3g}, should be zeros: what is divided by what?")
    lost, steps = torch.ones(1, 1, dtype=torch.float64), 0
    while kept is not None and kept < 1 - 1e-9 and steps < 5000:  # how long until ‖S‖ = 1 passes again?
        (_, kept), steps = its.limit(lost, kept), steps + 1
    must(not steps, f"zeros were remembered: it takes {steps:,} steps until ‖S‖ = 1 passes again. What must be kept?")
    must(kept == 3.0, f"after zeros it kept {kept}, should keep 3.0: what is the next spike compared with?")
    _, kept = its.limit(0 * S, None)
    must(kept is None, f"zeros in the very first step: it kept {kept}, should keep None. What may S be in the second?")
    new, _ = its.limit(S, norm / 3, gamma=2.0)
    must(abs(new.norm() / norm - 2 / 3) < 1e-6, "with γ = 2 ‖S‖ may double, and did not: do you use `gamma`?")

    G, P, Gs = randn(8, 12, seed=2), basis(8, 3), randn(51, 8, 12, seed=24)
    spiked, rest = its.spike(G, P, 50), G - P @ (P.T @ G)
    error = off(P.T @ spiked, P.T @ G)
    must(error < 1e-9, f"the spike changed PᵀG by {error:.2g} of its size, should leave it: which part does P see?")
    error = off(spiked - P @ (P.T @ spiked), 50 * rest)
    must(error < 1e-9, f"50 times what P cannot see is missed by {error:.2g}: what is that part, in G and P?")
    grew = {}
    for name, last in (("usual", Gs[50]), ("outside", its.spike(Gs[50], P, 50)), ("whole", 50 * Gs[50])):
        Ss = []
        for before, G in ((Gs[:49], Gs[49]), (Gs[:50], last)):
            Rs = [P.T @ H for H in (*before, G)]
            M, V = moments(Rs)
            Ss.append((M / (V.sqrt() + 1e-8)).norm(dim=0) / (Rs[-1].norm(dim=0) + 1e-8) * (G - P @ Rs[-1]))
        grew[name] = Ss[1].norm() / Ss[0].norm()
        grew[name + ", limited"] = its.limit(Ss[1], Ss[0].norm().item())[0].norm() / Ss[0].norm()
    free, limited = grew["outside"], grew["outside, limited"]
    yield f"what P cannot see times 50: ‖S‖ × {free:.0f} free, × {limited:.2f} with your limiter"
    yield f"the whole gradient times 50: ‖S‖ only × {grew['whole']:.1f} free (times 1: × {grew['usual']:.1f}). Why?"
    yield "a gradient of zeros is survived; with its norm kept, the way back to ‖S‖ = 1 would take 1,388 steps"


def check_6(its):
    names = {"projection": "P", "exp_avg": "M", "exp_avg_sq": "V", "prev_norm": "‖S_prev‖"}
    for m, n, r in ((24, 40, 8), (40, 24, 8), (24, 24, 4), (24, 40, 24)):
        w = torch.nn.Parameter(torch.zeros(m, n))
        w.grad = torch.ones(m, n)
        optimizer = Fira([w], rank=r)
        optimizer.step()
        held = {names[k]: x.numel() for k, x in optimizer.state[w].items() if isinstance(x, torch.Tensor)}
        parts, count = ", ".join(f"{k} {v}" for k, v in held.items()), its.state_numbers(m, n, r)
        wanted = f"Fira holds {sum(held.values())} ({parts})"
        must(count == sum(held.values()), f"{m}×{n}, rank {r}: {count} came out; {wanted}. Which of these are yours?")
    yield f"as many as Fira holds, tall ones and r = m too; at 512×512 and r = 128 {its.state_numbers(512, 512, 128):,}"
    for m, n in ((512, 512), (512, 1376), (1376, 512)):
        r = its.break_even(m, n)
        ours, adam = r * (min(m, n) + 2 * max(m, n)), 2 * m * n
        there = f"{m}×{n}: at rank {r:.1f} P, M and V are {ours:,.0f} numbers"
        must(abs(ours / adam - 1) < 0.002, f"{there}, should be Adam's {adam:,}: on which side of the equation is r?")
        yield f"{there}, Adam's too: above {r:.0f} nothing is saved"
