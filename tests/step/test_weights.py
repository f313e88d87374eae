"""Weights of every kind: memory orders, shared, 0-d, empty, thousands, in threads, in forked processes, above 2^31
elements.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import askew_cuda as askew

RULES = {
    "nesterov": (askew.AskewSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "amsgrad": (askew.AskewAdamW, {"lr": 0.02, "amsgrad": True}),
}
rules = pytest.mark.parametrize("rule", RULES)
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


def sliced(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((x, x), -1)[..., 1]


def shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def reversed_order(x: torch.Tensor) -> torch.Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def strided_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x), 1)[:, : x.shape[1]]


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "misaligned": shifted,
    "reversed": reversed_order,
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d),
    "sliced": sliced,
    "strided rows": strided_rows,
}


@rules
@backends
@pytest.mark.parametrize("quantizer", ["2bit/channel", "4bit/group4", "nf4", None])
@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (2, 4, 3, 3, 5)], ids=str)
def test_memory_order_changes_nothing(rule, backend, quantizer, shape):
    """Weight and gradient in each order, also in different ones: the numbers are those of the contiguous weight."""
    ours, keywords = RULES[rule]
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(shape, generator=generator) for _ in range(4))
    pairs = [
        ("contiguous", "contiguous"),
        *((name, name) for name in LAYOUTS),
        ("channels_last", "contiguous"),
        ("reversed", "sliced"),
    ]
    results = []
    for weight_layout, grad_layout in pairs:
        weight = LAYOUTS[weight_layout](start).detach().requires_grad_()
        strides = weight.stride()
        outputs = {"outputs": ("codes", "snapped")} if quantizer else {}
        optimizer = ours(
            [weight], quantizer=quantizer, pretrained=True, epsilon=0.4, backend=backend, **outputs, **keywords
        )
        for grad in grads:
            weight.grad = LAYOUTS[grad_layout](grad)
            optimizer.step()
        assert weight.stride() == strides
        state = {**optimizer.state[weight], **optimizer.outputs.get(weight, {})}
        results.append([weight.detach().contiguous(), *(state[key].contiguous() for key in sorted(state))])
    for names, result in zip(pairs, results, strict=True):
        for value, wanted in zip(result, results[0], strict=True):
            assert torch.equal(value, wanted), names


@rules
def test_a_weight_that_overlaps_itself_is_refused(rule):
    ours, keywords = RULES[rule]
    weight = torch.ones(1, 4).expand(3, 4).requires_grad_()
    weight.grad = torch.ones(3, 4)
    optimizer = ours([weight], quantizer="ternary", pretrained=True, backend="cpu", **keywords)
    with pytest.raises(ValueError, match=r"weights\[0\].*overlaps itself; clone"):
        optimizer.step()


@rules
@backends
def test_tied_weights_step_once_with_the_sum_of_their_gradients(rule, backend):
    ours, keywords = RULES[rule]
    torch.manual_seed(0)
    embedding, plain = nn.Embedding(7, 4), nn.Embedding(7, 4)
    plain.load_state_dict(embedding.state_dict())
    head = nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    tied = nn.Sequential(embedding, head)
    groups = askew.param_groups(tied, {"*": "ternary/channel"}, pretrained=True, verbose=False)
    assert sum(len(group["params"]) for group in groups) == 1
    optimizer = ours(groups, backend=backend, **keywords)
    other = ours([plain.weight], quantizer="ternary/channel", pretrained=True, backend=backend, **keywords)
    for k in range(3):
        index = torch.tensor([k, 2, 5])
        for model, last in (
            (lambda x: tied(x), optimizer),
            (lambda x: nn.functional.linear(plain(x), plain.weight), other),
        ):
            last.zero_grad()
            model(index).square().sum().backward()
            last.step()
    assert torch.equal(embedding.weight, plain.weight)
    assert head.weight is embedding.weight


@rules
@backends
@pytest.mark.parametrize("quantizer", ["ternary", "2bit/channel", "4bit/group2", None])
@pytest.mark.filterwarnings("ignore:finalize")
def test_0d_and_empty_weights(rule, backend, quantizer):
    ours, keywords = RULES[rule]
    shapes = [(), (0,), (3, 0), (0, 4), (2, 0, 3), (1,), (1, 2)]
    weights = [nn.Parameter(torch.full(shape, 0.75)) for shape in shapes]
    optimizer = ours(weights, quantizer=quantizer, pretrained=True, backend=backend, **keywords)
    for k in range(3):
        for weight in weights:
            weight.grad = torch.full(weight.shape, 1.0 - k)
        optimizer.step()
    for weight in weights:
        assert weight.numel() == 0 or bool((weight != 0.75).all())
    optimizer.param_groups[0]["epsilon"] = 0.0
    with optimizer.quantized():
        assert weights[0].shape == ()
    again = ours(
        [nn.Parameter(torch.full(shape, 0.75)) for shape in shapes], quantizer=quantizer, backend=backend, **keywords
    )
    again.load_state_dict(optimizer.state_dict())
    assert [weight.numel() for weight in again.param_groups[0]["params"]] == [1, 0, 0, 0, 0, 1, 2]
    assert optimizer.finalize().share_on_level <= 1.0


@rules
def test_groups_of_nothing_and_of_empty_weights_alone(rule):
    """An empty group leaves the step counters of the others alone (TransformerEngine #3318)."""
    ours, keywords = RULES[rule]
    full = nn.Parameter(torch.ones(2, 2))
    optimizer = ours([{"params": []}, {"params": [full]}, {"params": [nn.Parameter(torch.ones(0))]}], **keywords)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.step()
    assert rule == "nesterov" or optimizer.state[full]["step"] == 2


@rules
def test_two_thousand_tiny_weights(rule):
    ours, keywords = RULES[rule]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(k % 7 + 1, k % 5 + 1, generator=generator) for k in range(2000)]
    grads = [torch.randn(each.shape, generator=generator) for each in start]

    def run(parts: int) -> list[torch.Tensor]:
        weights = [nn.Parameter(each.clone()) for each in start]
        groups = [{"params": weights[i::parts]} for i in range(parts)]
        optimizer = ours(groups, quantizer="ternary", pretrained=True, **keywords)
        for _ in range(2):
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad
            optimizer.step()
        return weights

    for together, apart in zip(run(1), run(50), strict=True):
        assert torch.equal(together, apart)


def train(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter(torch.randn(40, 50, generator=generator)) for _ in range(3)]
    ours, keywords = RULES["nesterov" if seed % 2 else "amsgrad"]
    groups = [{"params": weights[:2], "quantizer": "2bit/channel"}, {"params": weights[2:]}]
    optimizer = ours(groups, pretrained=True, epsilon=0.3, **keywords)
    for k in range(10):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        if k % 4 == 0:
            with optimizer.quantized():
                pass
            optimizer.load_state_dict(optimizer.state_dict())
    return weights


def test_optimizers_in_threads_do_not_meet():
    alone = [train(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(train, range(8)))
    for mine, wanted in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))


FORK = """
import os, sys, torch
import askew_cuda as askew

torch.set_num_threads(2)
weight = torch.nn.Parameter(torch.linspace(-1, 1, 1 << 18))
weight.grad = torch.ones_like(weight)
optimizer = askew.AskewSGD([weight], lr=0.1, momentum=0.9, quantizer="ternary", pretrained=True)
optimizer.step()  # starts torch's threads

class Steps(torch.utils.data.Dataset):
    def __len__(self): return 1
    def __getitem__(self, index):
        optimizer.step()
        return weight.detach().clone()

if sys.argv[1] == "worker":  # a worker of a DataLoader sets one thread itself
    (found,) = torch.utils.data.DataLoader(Steps(), num_workers=1, multiprocessing_context="fork", batch_size=None)
else:
    read, write = os.pipe()
    if os.fork() == 0:
        torch.set_num_threads(1)
        optimizer.step()
        os.write(write, weight.detach().numpy().tobytes()[-4096:])
        os._exit(0)
    os.wait()
    found = torch.frombuffer(bytearray(os.read(read, 4096)), dtype=torch.float32)
optimizer.step()
print(torch.equal(found[-1024:], weight[-1024:].detach()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
@pytest.mark.parametrize("how", ["fork", "worker"])
def test_a_step_in_a_forked_process(how):
    """On one thread, as in a DataLoader's worker. With more it would wait for ever, as torch's own operators do: the
    threads of GNU OpenMP are not there in the child.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, how], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "True", done.stdout + done.stderr


def available() -> int:
    """Bytes of memory that are available now."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


HUGE = 2**31 + 77


@pytest.mark.skipif(sys.platform != "linux" or available() < 8 * HUGE, reason="needs 16 GiB of free memory")
def test_more_elements_than_int32_counts():
    # numpy's zeros are pages that take memory only once they are written
    weight, grad = (torch.from_numpy(np.zeros(HUGE, np.float16)) for _ in range(2))
    grad[-1], grad[2**31], grad[5] = -1.0, -2.0, -4.0
    weight.grad = grad
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        askew.AskewSGD([weight], lr=0.5, quantizer=askew.Quantizer("4bit", scale=1.0), clip=False, backend="cpu").step()
    finally:
        torch.set_num_threads(before)
    assert (weight[-1], weight[2**31], weight[5]) == (0.5, 1.0, 2.0)
    assert torch.count_nonzero(weight) == 3
