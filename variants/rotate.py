"""Carry Adam's moments into the new basis when the subspace changes.

Fira and GaLore keep M and V as they are: row j stays row j, though direction j is now another one. LDAdam
(arXiv:2410.16103) expresses them in the new directions. With Q = P_newᵀ P_old (r×r):

    M ← Q M              a momentum is a vector: exact for all of it that lies in the new subspace
    V ← (Q∘Q) V          a mean square of Σⱼ Qᵢⱼ Rⱼ is Σⱼ Qᵢⱼ² Vⱼ if the rows of R are uncorrelated

LDAdam itself changes its subspace in every step, centres V by M² first, and adds an error feedback of the gradient's
size; this is the question alone. What of the old momentum lies outside of the new subspace is dropped. Signs need no
care: Q turns M with its vector.

Costs two products of r×r by r×n at each change. No state is added.
"""

from fira import Fira


class Rotate(Fira):
    def change_subspace(self, state, P, group):
        M, V = state["exp_avg"], state["exp_avg_sq"]
        Q = P.T.to(M) @ state["projection"].to(M)  # (r, r); 0 at the first choice, where M and V are 0 too
        M.copy_(Q @ M)
        V.copy_(Q.square() @ V)
        state["projection"] = P.contiguous()
