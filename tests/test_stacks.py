"""Fira inside what people train with: distributed checkpoints, sharded optimizers and weights, two trainers.

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
from fira import Fira, param_groups  # noqa: E402

METHODS = {
    "adamw": {"rank": None},
    "subspace": {"rank": 4, "update_proj_gap": 3},
    "random": {"rank": 4, "update_proj_gap": 3, "proj_method": "random"},
    "full rank": {"rank": 99},
}
needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.inputs, self.blocks = nn.Embedding(11, 8), nn.ModuleList([Block(), Block()])

    def forward(self, tokens):
        x = self.inputs(tokens)
        for block in self.blocks:
            x = block(x)
        return x


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


# torch.distributed.checkpoint


@needs_distributed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_continues_bit_for_bit(one_process, tmp_path, method, named, flat):
    """It makes the state of a fresh optimizer by a step of its own with zero gradients, then fills it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as api

    def made(seed):
        model = Net(seed)
        groups = param_groups(model, **METHODS[method])
        if named:
            names = {p: name for name, p in model.named_parameters()}
            groups = [g | {"params": [(names[p], p) for p in g["params"]]} for g in groups]
        return model, Fira(groups, lr=0.01, weight_decay=0.1)

    options = api.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = made(0)
    train(model, optimizer, range(5))
    model_state, optimizer_state = api.get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    other, fresh = made(1)
    before = copy.deepcopy(other)
    state = dict(zip(("model", "optimizer"), api.get_state_dict(other, fresh, options=options)))
    assert same(other, before)  # the step of its own moved nothing
    dcp.load(state, checkpoint_id=tmp_path)
    api.set_state_dict(
        other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    train(model, optimizer, range(5, 12))
    train(other, fresh, range(5, 12))
    assert same(model, other)


# Weights and states that are split


def moved_to(optimizer, groups):
    """Give the optimizer these groups' parameters for its own, as accelerate does after FSDP has made new ones."""
    for group, new in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = new["params"]


@needs_distributed
@pytest.mark.parametrize("method", METHODS)
def test_fsdp_is_refused_by_name_where_it_splits_matrices(one_process, method):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = Net(), init_device_mesh("cpu", (1,))
    optimizer = Fira(param_groups(model, **METHODS[method]))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    groups = param_groups(model, **METHODS[method])
    moved_to(optimizer, groups)
    before = [p.full_tensor().detach().clone() for p in model.parameters()]
    if method == "adamw":  # which needs no whole matrices
        plain = Net()
        adamw = Fira(param_groups(plain, rank=None))
        for steps in (range(3), range(3, 6)):
            train(model, optimizer, steps)
            train(plain, adamw, steps)
            assert all(torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), plain.parameters()))
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return
    for refused in (lambda: train(model, optimizer, range(1)), lambda: Fira(groups)):
        with pytest.raises(ValueError, match="whole matrices .*FSDP splits them: use DistributedDataParallel"):
            refused()
    assert all(torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), before))


@needs_distributed
@pytest.mark.filterwarnings("ignore")
def test_the_older_fsdp_is_refused_by_name(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(Net(), use_orig_params=False, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="no blocks with matrices .FSDP hides them"):
        param_groups(model, rank=4)
    with pytest.raises(ValueError, match="FSDP splits them: use DistributedDataParallel"):
        Fira(model.parameters(), rank=4)
    train(model, Fira(model.parameters()), range(2))


def one_of_two(rank, folder):
    """A process of the test below; writes what it found wrong."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    faults = []
    for method, options in METHODS.items():
        plain, model = Net(), Net()
        optimizer = Fira(param_groups(plain, **options), lr=0.01)
        zero = ZeroRedundancyOptimizer(param_groups(model, **options), Fira, lr=0.01)
        train(plain, optimizer, range(10))
        train(model, zero, range(10))
        if not same(model, plain):
            faults.append(f"{method}: not the plain optimizer's weights")
        if not 0 < len(zero.optim.state) < len(optimizer.state):
            faults.append(f"{method}: the state was not split")
        zero.consolidate_state_dict(to=0)
        if rank == 0:  # the whole state continues in the plain optimizer
            again = Fira(param_groups(model, **options), lr=0.01)
            again.load_state_dict(zero.state_dict())
            train(plain, optimizer, range(10, 15))
            train(model, again, range(10, 15))
            if not same(model, plain):
                faults.append(f"{method}: the consolidated state continues otherwise")
    dist.barrier()
    Path(folder, f"{rank}.txt").write_text("\n".join(faults))
    os._exit(0)  # without a teardown, which can hang


@needs_distributed
def test_zero_redundancy_optimizer_is_the_plain_one_bit_for_bit(tmp_path):
    command = [sys.executable, "-W", "ignore", __file__]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["", ""]


# Trainers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_hugging_face_trainer_resumes_bit_for_bit(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    size = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        config, matrices = transformers.LlamaConfig(**size, intermediate_size=80), 2 * 7
    else:
        config, matrices = transformers.GPT2Config(**size, n_positions=16), 2 * 4
    tokens = torch.randint(61, (24, 16), generator=torch.Generator().manual_seed(0))
    ends = []
    for checkpoint in (None, tmp_path / "checkpoint-4"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if checkpoint:  # or a run from scratch would pass
            torch.nn.utils.vector_to_parameters(torch.zeros(10**6), model.parameters())
        optimizer = Fira(param_groups(model, rank=8, update_proj_gap=3), lr=1e-2)
        assert len(optimizer.param_groups[0]["params"]) == matrices
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=8, save_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to=[]
        )
        data = [{"input_ids": line, "labels": line} for line in tokens]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends.append(model)
    assert same(*ends)
    torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)


def test_lightning_resumes_bit_for_bit(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Net()

        def training_step(self, batch, _):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return Fira(param_groups(self, rank=4, update_proj_gap=3), lr=1e-2)

    tokens = torch.randint(11, (24, 16), generator=torch.Generator().manual_seed(0))
    ends = []
    for checkpoint in (None, tmp_path / "step=6.ckpt"):
        keep = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1, enable_version_counter=False
        )
        trainer = lightning.Trainer(
            max_steps=12, accelerator="cpu", logger=False, callbacks=keep, gradient_clip_val=1.0
        )
        ends.append(Lit())
        if checkpoint:
            torch.nn.utils.vector_to_parameters(torch.zeros(10**6), ends[-1].parameters())
        trainer.fit(ends[-1], torch.utils.data.DataLoader(tokens, batch_size=4), ckpt_path=checkpoint)
    assert same(*ends)


if __name__ == "__main__":
    one_of_two(int(sys.argv[1]), sys.argv[2])
