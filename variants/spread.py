"""Change the subspaces one matrix after the other over the T steps, instead of all of them in one step.

With T = 200, every 200th step chooses all subspaces and takes many times as long as the others. Choosing costs the same
in all if matrix i of k has its turn at

    t ≡ ⌊i T / k⌋  (mod T)

so one step in T / k is a little longer. All are chosen at the first step, so the first interval of each is shorter. It
changes when a subspace is chosen, nothing of how; a run is as good as before or the idea is wrong.

Costs: no state is added. On a CPU the choices of one step run on a core each, so spread out they leave the other cores
idle: there it is slower. It pays where one long step in 200 hurts, as a time limit or a watcher may be.
"""

from fira import Fira


class Spread(Fira):
    def change_subspaces(self, due):
        pairs = [
            (p, group) for group in self.param_groups for p in group["params"] if "projection" in self.state.get(p, ())
        ]
        turns = {}
        for i, (p, group) in enumerate(pairs):
            T, state = group["update_proj_gap"], self.state[p]
            if p.grad is not None and (not state["chosen"] or state["step"] % T == i * T // len(pairs)):
                turns[p] = group
        super().change_subspaces(list(turns.items()))
