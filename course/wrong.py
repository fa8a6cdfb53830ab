"""Typical wrong answers, each with a piece of the sentence that the check must say. tests/test_course.py tries them all.

A class is an answer; its first line of text is "exercise: sentence".
"""

import math

import torch

from course.properties import basis  # noqa: F401


class SmallestVectors:
    """1: Which singular vectors did you take?"""

    def project(G, r):
        P = torch.linalg.eigh(G @ G.T if len(G) <= G.shape[1] else G.T @ G).eigenvectors[:, :r]  # in ascending order
        return (P, P.T @ G) if len(G) <= G.shape[1] else (P, G @ P)


class AlwaysLeft:
    """1: which side is the short one?"""

    def project(G, r):
        P = torch.linalg.svd(G)[0][:, :r]
        return P, P.T @ G


class NotOrthonormal:
    """1: are P's columns of length 1"""

    def project(G, r):
        U, s, Vt = torch.linalg.svd(G, full_matrices=False)
        P = (U * s)[:, :r] if len(G) <= G.shape[1] else (Vt.T * s)[:, :r]
        return (P, P.T @ G) if len(G) <= G.shape[1] else (P, G @ P)


class FirstColumns:
    """1: is possible, and the best of 50 random bases"""

    def project(G, r):
        wide = len(G) <= G.shape[1]
        P = torch.linalg.qr((G if wide else G.T)[:, :r]).Q
        return (P, P.T @ G) if wide else (P, G @ P)


class RowsOfVt:
    """1: where does your R come from?"""

    def project(G, r):
        U, _, Vt = torch.linalg.svd(G, full_matrices=False)
        return (U[:, :r], Vt[:r]) if len(G) <= G.shape[1] else (Vt[:r].T, U[:, :r])


def galore(W, G, P, M, V, t, lr, alpha, beta1, beta2, eps, *, square=2, correction=None, late_eps=False, sign=1):
    R = P.T @ G
    M, V = beta1 * M + (1 - beta1) * R, beta2 * V + (1 - beta2) * R.abs() ** square
    c_t = math.sqrt(1 - beta2**t) / (1 - beta1**t) if correction is None else correction
    N = M / (V.sqrt() + eps * (math.sqrt(1 - beta2**t) if late_eps else 1))
    return W - sign * lr * c_t * alpha * P @ N, M, V


class NoBiasCorrection:
    """2: the first step is 3.16 times as long"""

    def galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
        return galore(W, G, P, M, V, t, lr, alpha, beta1, beta2, eps, correction=1)


class NoAlpha:
    """2: the first step is 4 times as long"""

    def galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
        return galore(W, G, P, M, V, t, lr, 1, beta1, beta2, eps)


class MomentsOfG:
    """2: whose moments are they, G's or R's?"""

    def galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
        M, V = 0.9 * M.sum() + 0.1 * G, 0.999 * V.sum() + 0.001 * G**2
        return W - lr * P @ (P.T @ (M / V.sqrt())), M, V


class FirstCorrectionForEver:
    """2: what must change with t?"""

    def galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
        return galore(W, G, P, M, V, 1, lr, alpha, beta1, beta2, eps)


class EpsAfterCorrection:
    """2: where is ε added, before or after the bias correction?"""

    def galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
        return galore(W, G, P, M, V, t, lr, alpha, beta1, beta2, eps, late_eps=True)


class Uphill:
    """2: goes up the gradient, should go down"""

    def galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
        return galore(W, G, P, M, V, t, lr, alpha, beta1, beta2, eps, sign=-1)


class AsWritten:
    """3: products were counted, should be 2"""

    def fused_step(W, G, P, N, phi, lr, alpha):
        W -= lr * (alpha * P @ N + phi * (G - P @ (P.T @ G)))


class LargeTemporary:
    """3: a new tensor of 96 numbers was made"""

    def fused_step(W, G, P, N, phi, lr, alpha):
        W -= lr * (P @ (alpha * N - phi * (P.T @ G)) + phi * G)


class NotInPlace:
    """3: do you change W itself"""

    def fused_step(W, G, P, N, phi, lr, alpha):
        W = W - lr * (P @ (alpha * N - phi * (P.T @ G)) + phi * G)


class CountsTwice:
    """3: so what P sees counts twice"""

    def fused_step(W, G, P, N, phi, lr, alpha):
        W.addmm_(P, alpha * N, alpha=-lr).addcmul_(G, phi, value=-lr)


class AlphaForAll:
    """3: α is before S too"""

    def fused_step(W, G, P, N, phi, lr, alpha):
        W.addmm_(P, N - phi * (P.T @ G), alpha=-lr * alpha).addcmul_(G, phi, value=-lr * alpha)


class SameRows(AlphaForAll):
    """3: do the columns of rows∘(PR) leave the span of P?"""

    def fused_step(W, G, P, N, phi, lr, alpha):
        W.addmm_(P, alpha * N - phi * (P.T @ G), alpha=-lr).addcmul_(G, phi, value=-lr)

    def counterexample():
        return torch.eye(4)[:, :2], torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0, 4.0])


class RowNorms:
    """4: over which dimension is the norm of a column?"""

    def scaling(N, R, eps=1e-8):
        return N.norm(dim=1) / (R.norm(dim=1) + eps)


class UpsideDown:
    """4: φ is upside down"""

    def scaling(N, R, eps=1e-8):
        return R.norm(dim=0) / (N.norm(dim=0) + eps)


class OneForAll:
    """4: that is the paper's Fira-matrix"""

    def scaling(N, R, eps=1e-8):
        return N.norm() / (R.norm() + eps)


class Elementwise:
    """4: is it elementwise?"""

    def scaling(N, R, eps=1e-8):
        return N / (R + eps)


class NoEps:
    """4: columns of zeros got φ = nan"""

    def scaling(N, R, eps=1e-8):
        return N.norm(dim=0) / R.norm(dim=0)


class Squared:
    """4: Is a root missing?"""

    def scaling(N, R, eps=1e-8):
        return (N**2).sum(0) / ((R**2).sum(0) + eps)


def limited(S, prev, gamma, *, first=None, store="limited", zero="keep"):
    prev, norm = first if prev is None else prev, S.norm().item()
    if norm == 0 and zero == "keep":
        return S, prev
    factor = 1.0 if prev is None else gamma / max(norm / (prev + 1e-8), gamma)
    return S * factor, norm * (factor if store == "limited" else 1)


class StoresFreeNorm:
    """5: which norm did you store?"""

    def limit(S, prev_norm, gamma=1.01):
        return limited(S, prev_norm, gamma, store="free")


class StoresZero:
    """5: 1,851 steps from 1e-8 to 1"""

    def limit(S, prev_norm, gamma=1.01):
        return limited(S, prev_norm, gamma, zero="store")


class StartsAtZero:
    """5: what is there to compare with?"""

    def limit(S, prev_norm, gamma=1.01):
        return limited(S, prev_norm, gamma, first=0.0)


class AlwaysGrows:
    """5: what is the max for?"""

    def limit(S, prev_norm, gamma=1.01):
        norm = S.norm().item()
        return (S, norm) if prev_norm is None else (S * gamma * prev_norm / norm, gamma * prev_norm)


class ClipsToOne:
    """5: what is there to compare with?"""

    def limit(S, prev_norm, gamma=1.01):
        return S / max(1, S.norm().item()), S.norm().item()


class Free:
    """5: after the spike ‖S‖ grew by 57.3; the limiter allows 1.01."""

    def limit(S, prev_norm, gamma=1.01):
        return S, S.norm().item()


class Elements:
    """5: is every number multiplied by the same factor?"""

    def limit(S, prev_norm, gamma=1.01):
        if prev_norm is None or S.norm() <= gamma * prev_norm:
            return S, S.norm().item()
        low, high = 0.0, S.abs().max().item()
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if S.clamp(-middle, middle).norm() > gamma * prev_norm else (middle, high)
        return S.clamp(-low, low), gamma * prev_norm


class SpikeOfAll:
    """5: which part does P see?"""

    def limit(S, prev_norm, gamma=1.01):
        return limited(S, prev_norm, gamma)

    def spike(G, P, factor):
        return factor * G
