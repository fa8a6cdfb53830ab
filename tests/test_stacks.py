"""Fira inside what people train with: distributed checkpoints, split states and weights, two trainers.

`python tests/test_stacks.py RANK FOLDER` is one of the two processes of the test of ZeroRedundancyOptimizer.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fira import Fira, param_groups

METHODS = {
    "adamw": {"rank": None},
    "subspace": {"rank": 4, "update_proj_gap": 3},
    "random": {"rank": 4, "update_proj_gap": 3, "proj_method": "random"},
    "full_rank": {"rank": 99},
}
pytestmark = pytest.mark.filterwarnings("ignore")
needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def small_model(seed=0):
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 8)) for _ in range(2)]
    return nn.Sequential(nn.Embedding(11, 8), *blocks)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_distributed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_continues_bit_for_bit(one_process, tmp_path, method, flat):
    """It makes the state of a fresh optimizer by a step of its own with zero gradients, then fills it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as api

    options = api.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = small_model(0), small_model(1)
    optimizer, fresh = (Fira(param_groups(m, **METHODS[method]), lr=0.01, weight_decay=0.1) for m in (model, other))
    train(model, optimizer, range(5))
    dcp.save(dict(zip("mo", api.get_state_dict(model, optimizer, options=options))), checkpoint_id=tmp_path)
    state = dict(zip("mo", api.get_state_dict(other, fresh, options=options)))
    assert same(other, small_model(1)) and fresh.state  # its own step has moved nothing
    dcp.load(state, checkpoint_id=tmp_path)
    api.set_state_dict(other, fresh, model_state_dict=state["m"], optim_state_dict=state["o"], options=options)
    train(model, optimizer, range(5, 12))
    train(other, fresh, range(5, 12))
    assert same(model, other)


@needs_distributed
@pytest.mark.skipif(torch.__version__ < "2.7", reason="before torch 2.7 fully_shard needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_fsdp_is_refused_by_name_where_it_splits_matrices(one_process, method):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model, plain, mesh = small_model(), small_model(), init_device_mesh("cpu", (1,))
    optimizer, of_plain = (Fira(param_groups(m, **METHODS[method]), lr=0.01) for m in (model, plain))
    for part in (*model[1:], model):
        fully_shard(part, mesh=mesh)
    groups = param_groups(model, **METHODS[method])
    for group, new in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = new["params"]  # as accelerate does it: DTensors come after construction
    flat = FullyShardedDataParallel(small_model(), use_orig_params=False, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="no blocks with matrices .FSDP"):
        param_groups(flat, **METHODS[method])
    of_flat = [{"params": list(flat.parameters()), **METHODS[method]}]
    if method == "adamw":  # which needs no whole matrices
        for steps in (range(3), range(3, 6)):
            train(model, optimizer, steps)
            train(plain, of_plain, steps)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert all(torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), plain.parameters()))
        return train(flat, Fira(of_flat), range(2))
    for refused in (lambda: train(model, optimizer, range(1)), lambda: Fira(groups), lambda: Fira(of_flat)):
        with pytest.raises(ValueError, match="whole matrices .*FSDP splits them: use DistributedDataParallel"):
            refused()
    assert all(torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), plain.parameters()))


def one_of_two(rank, folder):
    """A process of the test below; writes what it found wrong."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    faults = []
    for method, options in METHODS.items():
        plain, model = small_model(), small_model()
        optimizer = Fira(param_groups(plain, **options), lr=0.01)
        zero = ZeroRedundancyOptimizer(param_groups(model, **options), Fira, lr=0.01)
        for m, o in ((plain, optimizer), (model, zero)):
            train(m, o, range(8))
        if not same(model, plain) or not 0 < len(zero.optim.state) < len(optimizer.state):
            faults.append(f"{method}: other weights, or a state that was not split")
        zero.consolidate_state_dict(to=0)
        if rank == 0:  # the whole state continues in the plain optimizer
            whole = Fira(param_groups(model, **options), lr=0.01)
            whole.load_state_dict(zero.state_dict())
            for m, o in ((plain, optimizer), (model, whole)):
                train(m, o, range(8, 12))
            if not same(model, plain):
                faults.append(f"{method}: the consolidated state continues otherwise")
    dist.barrier()
    Path(folder, f"{rank}.txt").write_text("\n".join(faults))
    os._exit(0)  # without a teardown, which can hang


@needs_distributed
def test_zero_redundancy_optimizer_is_the_plain_one_bit_for_bit(tmp_path):
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["", ""]


def test_the_hugging_face_trainer_resumes_bit_for_bit(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    size = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**size, intermediate_size=80, bos_token_id=1, eos_token_id=2)
    data = [{"input_ids": x, "labels": x} for x in torch.randint(61, (24, 16))]
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        if checkpoint:  # or a run from scratch would pass
            torch.nn.utils.vector_to_parameters(torch.zeros(10**6), model.parameters())
        optimizer = Fira(param_groups(model, rank=8, update_proj_gap=3), lr=1e-2)
        assert len(optimizer.param_groups[0]["params"]) == 2 * 7
        steps = {"max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 4}
        arguments = transformers.TrainingArguments(str(tmp_path), **steps, use_cpu=True, report_to=[])
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(model)
    assert same(*ends)
    torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)


def test_lightning_resumes_bit_for_bit(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def training_step(self, batch, _):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return Fira(param_groups(self, rank=4, update_proj_gap=3), lr=1e-2)

    data, ends = torch.utils.data.DataLoader(torch.randint(11, (24, 16)), batch_size=4), []
    for checkpoint in (None, tmp_path / "step=6.ckpt"):
        keep = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1, enable_version_counter=False
        )
        trainer = lightning.Trainer(max_steps=12, accelerator="cpu", logger=False, callbacks=keep)
        ends.append(Lit())
        if checkpoint:
            torch.nn.utils.vector_to_parameters(torch.zeros(10**6), ends[-1].parameters())
        trainer.fit(ends[-1], data, ckpt_path=checkpoint)
    assert same(*ends)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), sys.argv[2])
