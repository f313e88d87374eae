"""What people do to weights, gradients, state and groups between two steps: the next step follows it, or refuses it by
name before anything has moved.
"""

import copy
import gc
import pickle
import threading
import weakref
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

import askew_cuda as askew
from askew_cuda.backends import absent

TRITON = [] if absent("triton", torch.device("cpu"), torch.float32) else ["triton"]  # TRITON_INTERPRET=1
backends = pytest.mark.parametrize("backend", ["cpu", "reference", *TRITON])
pytestmark = pytest.mark.filterwarnings("ignore:finalize", "ignore:.*of its weights are exactly 0")
RULES = {"sgd": (askew.AskewSGD, {"momentum": 0.9}), "adamw": (askew.AskewAdamW, {})}
rules = pytest.mark.parametrize("rule", RULES)


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (4, 6), generator=torch.Generator().manual_seed(seed)).to(dtype))


def fill(weights: list[Tensor], k: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 + k)
    for each in weights:
        each.grad = torch.randn(each.shape, generator=generator).to(each.dtype)


def optimizer_of(weights: list[Tensor], rule: str = "sgd", **more):
    ours, keywords = RULES[rule]
    named = [(f"w{i}", each) for i, each in enumerate(weights)]
    return ours(named, **{"lr": 0.1, "quantizer": "ternary", "pretrained": True, **keywords, **more})


def steps(optimizer, weights: list[Tensor], first: int, count: int) -> None:
    for k in range(first, first + count):
        fill(weights, k)
        optimizer.step()


def results(optimizer, weights: list[Tensor]) -> list[Tensor]:
    """Weights and states, in one memory order."""
    kept = [value for each in weights for value in optimizer.state[each].values()]
    return [each.detach().clone().contiguous() for each in [*weights, *kept]]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def everywhere(change):
    """A change of the data of all states of the first weight."""

    def do(optimizer, first) -> None:
        for value in optimizer.state[first].values():
            value.data = change(value.data)

    return do


HARMLESS = {
    "another address": lambda optimizer, first: setattr(first, "data", first.data.clone()),
    "another memory order": lambda optimizer, first: setattr(first, "data", transposed(first.data)),
    "state away and back": everywhere(lambda value: value.clone()),
    "state in another order": everywhere(lambda value: transposed(value) if value.dim() == 2 else value),
    "state replaced": lambda optimizer, first: optimizer.state[first].update(copy.deepcopy(optimizer.state[first])),
    "state dictionary replaced": lambda optimizer, first: optimizer.state.update({first: dict(optimizer.state[first])}),
    "outputs replaced": lambda optimizer, first: optimizer.outputs[first].update(codes=torch.zeros(4, 6).byte()),
    "a list of its own": lambda optimizer, first: optimizer.param_groups[0].update(
        params=list(optimizer.param_groups[0]["params"])
    ),
    "a group of its own": lambda optimizer, first: optimizer.param_groups.__setitem__(
        0, dict(optimizer.param_groups[0])
    ),
}


@rules
@backends
@pytest.mark.parametrize("change", HARMLESS)
def test_where_things_lie_does_not_matter(rule, backend, change):
    found = []
    for changed in (False, True):
        weights = [weight(), weight(3, seed=1)]
        optimizer = optimizer_of(weights, rule, backend=backend, outputs=["codes"])
        steps(optimizer, weights, 0, 3)
        if changed:
            HARMLESS[change](optimizer, weights[0])
        steps(optimizer, weights, 3, 3)
        found.append([*results(optimizer, weights), optimizer.outputs[weights[0]]["codes"].contiguous()])
    assert same(*found)


@rules
@backends
def test_gradients_in_another_memory_order_each_step(rule, backend):
    found = []
    for changing in (False, True):
        weights = [weight()]
        optimizer = optimizer_of(weights, rule, backend=backend)
        for k in range(6):
            fill(weights, k)
            if changing and k % 2:
                weights[0].grad = transposed(weights[0].grad)
            optimizer.step()
        found.append(results(optimizer, weights))
    assert same(*found)


@rules
@backends
def test_a_weight_of_another_size_is_refused(rule, backend):
    weights = [weight(seed=1), weight()]
    optimizer = optimizer_of(weights, rule, backend=backend)
    steps(optimizer, weights, 0, 2)
    before = weights[0].detach().clone()
    weights[1].data, weights[1].grad = torch.zeros(2, 6), torch.ones(2, 6)
    state = "exp_avgs" if rule == "adamw" else "momentum_buffers"
    with pytest.raises(ValueError, match=rf"{state}\[1\] \(w1\) has shape \[4, 6\] but weights\[1\] has \[2, 6\]"):
        optimizer.step()
    assert torch.equal(weights[0], before)


@rules
@backends
def test_gradients_that_come_late_or_every_other_step(rule, backend):
    """Mixture of experts: as torch does."""
    mine, theirs = ([weight(seed=k) for k in range(3)] for _ in range(2))
    optimizer = optimizer_of(mine, rule, backend=backend, quantizer=None, pretrained=False)
    truth = torch.optim.SGD(theirs, 0.1, momentum=0.9) if rule == "sgd" else torch.optim.AdamW(theirs, 0.1)
    for k in range(7):
        fill(mine, k), fill(theirs, k)
        for weights in (mine, theirs):
            weights[1].grad = weights[1].grad if k >= 3 else None
            weights[2].grad = weights[2].grad if k % 2 else None
        optimizer.step(), truth.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if rule == "adamw":
        assert [float(optimizer.state[each]["step"]) for each in mine] == [7, 4, 3]


@backends
def test_momentum_that_is_switched_on_and_off(backend):
    mine, theirs = weight(), weight()
    optimizer = optimizer_of([mine], backend=backend, quantizer=None, pretrained=False, momentum=0)
    truth = torch.optim.SGD([theirs], 0.1)
    for k in range(6):
        for group in (optimizer.param_groups[0], truth.param_groups[0]):
            group["momentum"] = 0.9 if 2 <= k < 4 else 0
        fill([mine], k), fill([theirs], k)
        optimizer.step(), truth.step()
    torch.testing.assert_close(mine, theirs)


@rules
@backends
def test_momentum_and_betas_that_follow_a_cycle(rule, backend):
    mine, theirs = weight(), weight()
    optimizer = optimizer_of([mine], rule, backend=backend, quantizer=None, pretrained=False)
    truth = torch.optim.SGD([theirs], 0.1, momentum=0.9) if rule == "sgd" else torch.optim.AdamW([theirs], 0.1)
    cycles = [torch.optim.lr_scheduler.OneCycleLR(each, 0.2, total_steps=10) for each in (optimizer, truth)]
    for k in range(9):
        fill([mine], k), fill([theirs], k)
        for each in (optimizer, truth, *cycles):
            each.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert optimizer._plan is not None or backend == "reference"  # the numbers of a cycle need no new plan


@backends
def test_a_group_that_is_added_between_steps(backend):
    first, second = weight(), weight(seed=1)
    optimizer = optimizer_of([first], backend=backend)
    steps(optimizer, [first], 0, 2)
    optimizer.add_param_group({"params": [("late", second)], "lr": 0.5, "quantizer": None, "weight_decay": 0.0})
    before = second.detach().clone()
    fill([first, second])
    optimizer.step()
    assert torch.equal(second, before + second.grad * -0.5)


@rules
@backends
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_no_plan_and_steps_its_own_weights(rule, backend, how):
    mine = weight()
    optimizer = optimizer_of([mine], rule, backend=backend)
    steps(optimizer, [mine], 0, 2)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    (theirs,) = twin.param_groups[0]["params"]
    before = mine.detach().clone()
    assert twin._plan is None
    steps(twin, [theirs], 2, 2)
    assert torch.equal(mine, before)
    steps(optimizer, [mine], 2, 2)
    assert same(results(optimizer, [mine]), results(twin, [theirs]))
    twin.param_groups[0]["quantizer"] = "4bit"
    with pytest.raises(ValueError, match="the scale of w0 was set for 'ternary'"):
        twin.step()


def test_a_model_and_its_optimizer_are_copied_together():
    model = nn.Linear(6, 4)
    optimizer = optimizer_of(list(model.parameters()))
    steps(optimizer, list(model.parameters()), 0, 2)
    again, twin = copy.deepcopy((model, optimizer))
    steps(twin, list(again.parameters()), 2, 1)
    assert not torch.equal(model.weight, again.weight)
    steps(optimizer, list(model.parameters()), 2, 1)
    assert torch.equal(model.weight, again.weight)


@backends
def test_replaced_parameters_are_freed(backend):
    """As Gaussian splatting replaces them, with their state or without."""
    first, second = weight(), weight(seed=1)
    optimizer = optimizer_of([first, second], backend=backend, outputs=["codes"])
    steps(optimizer, [first, second], 0, 2)
    for state_moves, gradient in ((True, True), (False, True), (False, False)):
        gone, state = weakref.ref(first), optimizer.state.pop(first, {})
        new = nn.Parameter(torch.cat([first.detach(), torch.ones(2, 6)]))
        if state_moves:
            rows = torch.cat([state["momentum_buffer"], torch.zeros(2, 6)])
            optimizer.state[new] = {**state, "momentum_buffer": rows}
        optimizer.param_groups[0]["params"][0] = first = new
        del new, state
        fill([first, second])
        if not gradient:
            first.grad = None
        optimizer.step()
        gc.collect()
        assert gone() is None, (state_moves, gradient)


def test_an_optimizer_is_freed_without_the_garbage_collector():
    optimizer_of([weight()])  # the first one of a process has torch import Dynamo, which keeps the frame that asked
    first = weight()
    optimizer = optimizer_of([first], outputs=["codes"])
    steps(optimizer, [first], 0, 2)
    gone = [weakref.ref(optimizer), weakref.ref(first)]
    gc.disable()
    try:
        del optimizer, first
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


def look(optimizer) -> None:
    askew.monitor(optimizer).sample()


def snap_for_a_while(optimizer) -> None:
    with optimizer.quantized():
        pass


USES = {
    "step": lambda optimizer: optimizer.step(),
    "prepare": lambda optimizer: optimizer.prepare(),
    "finalize": lambda optimizer: optimizer.finalize(),
    "quantized": snap_for_a_while,
    "monitor": look,
    "codes": lambda optimizer: list(optimizer.quantized_parameters()),
}


@backends
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("scaled_by", ["a step", "two steps", "prepare", "a checkpoint", "finalize"])
def test_another_quantizer_needs_another_scale(backend, use, scaled_by):
    """Refused, unless the old scale is removed on purpose: then the weights give a new one."""
    first = weight()
    optimizer = optimizer_of([first], backend=backend)
    if scaled_by == "prepare":
        optimizer.prepare()
    elif scaled_by == "finalize":
        optimizer.finalize()
    else:
        steps(optimizer, [first], 0, 2 if scaled_by == "two steps" else 1)
    if scaled_by == "a checkpoint":
        saved, optimizer = optimizer.state_dict(), optimizer_of([first], backend=backend)
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["quantizer"] = "4bit"
    fill([first], 9)
    before = first.detach().clone()
    with pytest.raises(ValueError, match=r"quantizer = '4bit', but the scale of w0 was set for 'ternary'.*del opt"):
        USES[use](optimizer)
    assert torch.equal(first, before)
    del optimizer.state[first]["scale"]
    wanted = askew.AskewSGD([("w0", first)], quantizer="4bit", pretrained=True)
    wanted.prepare()
    USES["prepare"](optimizer)
    assert torch.equal(optimizer.state[first]["scale"], wanted.state[first]["scale"])
    USES[use](optimizer)


def test_the_same_quantizer_in_other_words_is_the_same():
    first = weight()
    optimizer = optimizer_of([first], quantizer="1bit")
    steps(optimizer, [first], 0, 1)
    for spec in ("1bit", askew.Quantizer("binary"), {"levels": [-1.0, 1.0]}):
        optimizer.param_groups[0]["quantizer"] = spec
        steps(optimizer, [first], 1, 1)


@backends
@pytest.mark.parametrize("use", USES)
def test_a_state_that_is_gone_in_mid_annealing_is_refused(backend, use):
    first = weight()
    optimizer = optimizer_of([first], backend=backend)
    steps(optimizer, [first], 0, 1)
    optimizer.param_groups[0]["epsilon"] = 0.5
    steps(optimizer, [first], 1, 2)
    kept, optimizer.state = optimizer.state, defaultdict(dict)
    before = first.detach().clone()
    with pytest.raises(
        ValueError, match=r"the scale of w0 is gone from optimizer.state in mid-annealing \(epsilon = 0.5\)"
    ):
        USES[use](optimizer)
    assert torch.equal(first, before)
    optimizer.state = kept
    USES[use](optimizer)


MODES = {
    "plain": {},
    "remainder": {"low_precision": "remainder"},
    "stochastic": {"low_precision": "stochastic"},
    "outputs": {"outputs": ["codes", "snapped"]},
    "wide": {"state_dtype": torch.float32},
}


@rules
@backends
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_changes_its_dtype_goes_on_or_says_how(rule, backend, mode, to):
    model = nn.Linear(6, 4).to(torch.bfloat16 if mode == "wide" else torch.float32)
    weights = list(model.parameters())
    optimizer = optimizer_of(weights, rule, backend=backend, **MODES[mode])
    steps(optimizer, weights, 0, 2)
    model.to(to)
    fill(weights, 2)
    before = [each.detach().clone() for each in weights]
    if to == torch.float64:
        casts, elsewhere = r"optimizer.load_state_dict\(optimizer.state_dict\(\)\)", "backend='reference' steps float64"
        message = elsewhere if backend == "triton" and mode != "wide" else casts
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            optimizer.step()
        assert same(weights, before)
        if backend == "triton":  # which computes in float32
            return
        if mode == "wide":
            optimizer.param_groups[0]["state_dtype"] = None  # as the message says
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    if rule == "adamw":
        assert optimizer.state[weights[0]]["step"] == 3


def test_a_model_that_was_moved_is_told_how_its_state_follows():
    first = weight()
    optimizer = optimizer_of([first], backend="reference")
    steps(optimizer, [first], 0, 2)
    optimizer.state[first]["momentum_buffer"] = torch.zeros(4, 6, device="meta")
    with pytest.raises(
        ValueError, match=r"is on meta but weights\[0\] is on cpu.*load_state_dict\(optimizer.state_dict"
    ):
        optimizer.step()


class Mine(nn.Parameter):
    """A class of somebody's own."""


class Watched(Tensor):
    """A class whose functions go through Python."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


KINDS = {"Parameter": nn.Parameter, "subclass": Mine, "torch_function": lambda t: nn.Parameter(t.as_subclass(Watched))}


@rules
@backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["first", "later"])
def test_two_weights_on_one_memory_are_refused_by_name(rule, backend, kind, when):
    weights = [KINDS[kind](weight(seed=k).detach()) for k in range(2)]
    optimizer = optimizer_of(weights, rule, backend=backend)
    if when == "later":
        steps(optimizer, weights, 0, 2)
    weights[1].data = weights[0].data
    fill(weights, 2)
    before = weights[0].detach().clone()
    with pytest.raises(ValueError, match=r"weights\[0\] \(w0\) and weights\[1\] \(w1\) share memory"):
        optimizer.step()
    assert torch.equal(weights[0], before)


def alias_momentum_of_another(optimizer, first, second) -> None:
    optimizer.state[first]["momentum_buffer"] = optimizer.state[second]["momentum_buffer"]


ALIASES = {
    "momentum_buffers": lambda o, a, b: o.state[a].update(momentum_buffer=a.data),
    "momentum_buffers of two": alias_momentum_of_another,
    "scales": lambda o, a, b: o.state[a].update(scale=b.data[0, 0]),
    "snapped": lambda o, a, b: o.outputs[a].update(snapped=a.data),
    "snapped of two": lambda o, a, b: o.outputs[a].update(snapped=o.outputs[b]["snapped"]),
    "codes": lambda o, a, b: o.outputs[a].update(codes=b.data.view(torch.uint8)[:, :6]),
}


@backends
@pytest.mark.parametrize("alias", ALIASES)
def test_states_and_outputs_on_one_memory_are_refused_by_name(backend, alias):
    weights = [weight(seed=k) for k in range(2)]
    optimizer = optimizer_of(weights, backend=backend, outputs=["codes", "snapped"])
    steps(optimizer, weights, 0, 2)
    ALIASES[alias](optimizer, *weights)
    before = results(optimizer, weights)
    with pytest.raises(ValueError, match=rf"{alias.split()[0]}\[.\] \(w.\).* share memory"):
        optimizer.step()
    assert same(results(optimizer, weights), before)


def test_a_weight_that_was_listed_twice_by_hand_is_refused():
    first = weight()
    optimizer = optimizer_of([first])
    steps(optimizer, [first], 0, 1)
    optimizer.param_groups[0]["params"].append(first)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()


@pytest.mark.parametrize("threads", [1, 2])
def test_slices_of_one_buffer_step_as_weights_of_their_own(threads):
    buffer = torch.randn(4 * 20_000, generator=torch.Generator().manual_seed(0))

    def slices(of: Tensor) -> list[Tensor]:
        return [of[:20_000].view(100, 200), of[20_000:40_000], of[40_000::2], of[40_001::2]]

    apart = [nn.Parameter(each.clone()) for each in slices(buffer)]
    together = [nn.Parameter(each) for each in slices(buffer)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for weights in (apart, together):
            steps(optimizer_of(weights), weights, 0, 3)
    finally:
        torch.set_num_threads(before)
    assert same(slices(buffer), apart)


@rules
@backends
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_other_classes_step_alike(rule, backend, kind):
    found = []
    for make in (nn.Parameter, KINDS[kind]):
        weights = [make(weight().detach())]
        optimizer = optimizer_of(weights, rule, backend=backend)
        steps(optimizer, weights, 0, 3)
        found.append([each.as_subclass(Tensor) for each in results(optimizer, weights)])
    assert same(*found)


@backends
def test_tensors_of_inference_mode_are_refused_outside_of_it(backend):
    with torch.inference_mode():
        second = nn.Parameter(torch.ones(4, 6))
    first = weight()
    optimizer = optimizer_of([first, second], backend=backend)
    fill([first])
    with torch.inference_mode():
        fill([second])
    before = first.detach().clone()
    with pytest.raises(RuntimeError, match=r"weights\[1\] \(w1\) was made in inference mode.*clone\(\)"):
        optimizer.step()
    assert torch.equal(first, before)
    with torch.inference_mode():
        optimizer.step()
    assert not torch.equal(first, before)


@backends
@pytest.mark.parametrize("which", ["epsilon", "seed"])
def test_numbers_that_a_step_fills_must_let_it(backend, which):
    """Found before the step, though they are filled after it."""
    first = weight(dtype=torch.bfloat16)
    more = {"low_precision": "stochastic", "seed": torch.tensor(3), "epsilon": torch.tensor(1.0)}
    optimizer = optimizer_of([first], backend=backend, total_steps=9, hold=0.0, **more)
    steps(optimizer, [first], 0, 1)
    group, before = optimizer.param_groups[0], first.detach().clone()
    good = group[which]
    with torch.inference_mode():
        group[which] = good.clone()
    with pytest.raises(RuntimeError, match=rf"{which} = .* was made in inference mode"):
        optimizer.step()
    if which == "epsilon":
        group[which] = torch.tensor(1)
        with pytest.raises(TypeError, match=r"epsilon = tensor\(1\) holds whole numbers"):
            optimizer.step()
    assert torch.equal(first, before)
    assert group["steps_done"] == 1
    group[which] = good
    optimizer.step()
    assert group["steps_done"] == 2


@rules
def test_a_seed_in_a_tensor_advances_where_a_plan_is_kept(rule):
    """Each step has random bits of its own, and they are the same on every backend."""
    found = []
    for backend, seed in (("cpu", 7), ("cpu", torch.tensor(7)), ("reference", torch.tensor(7))):
        first = weight(30, 40, dtype=torch.bfloat16)
        optimizer = optimizer_of([first], rule, backend=backend, low_precision="stochastic", seed=seed, lr=0.001)
        steps(optimizer, [first], 0, 4)
        found.append([*results(optimizer, [first]), torch.as_tensor(optimizer.param_groups[0]["seed"])])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@backends
def test_a_plan_is_kept_while_another_optimizer_steps_the_same_weight(backend):
    """The result is the same as where no plan is kept."""
    found = []
    for kept in (True, False):
        first = weight()
        pair = [optimizer_of([first], backend=backend), optimizer_of([first], "adamw", backend=backend, quantizer=None)]
        for k in range(4):
            fill([first], k)
            for optimizer in pair:
                optimizer._plan = optimizer._plan if kept else None
                optimizer.step()
        found.append(first.detach())
    assert torch.equal(*found)


def test_two_threads_step_two_optimizers():
    found = []
    for threaded in (False, True):
        weights = [weight(200, 300, seed=k) for k in range(2)]
        fill(weights)
        optimizers = [optimizer_of([each]) for each in weights]

        def run(optimizer) -> None:
            for _ in range(20):
                optimizer.step()

        threads = [threading.Thread(target=run, args=(each,)) for each in optimizers]
        for thread in threads:
            thread.start() if threaded else thread.run()
        for thread in threads if threaded else ():
            thread.join()
        found.append([each.detach() for each in weights])
    assert same(*found)


@backends
def test_a_hook_may_change_what_a_step_is_made_of(backend):
    first = weight()
    optimizer = optimizer_of([first], backend=backend, quantizer=None, momentum=0)
    steps(optimizer, [first], 0, 2)
    optimizer.register_step_pre_hook(lambda *_: setattr(first, "data", first.data + 1))
    before, _ = first.detach().clone(), fill([first], 2)
    optimizer.step()
    torch.testing.assert_close(first, before + 1 - 0.1 * first.grad)
    optimizer.register_step_pre_hook(lambda *_: optimizer.param_groups[0].update(lr="x"))
    with pytest.raises(TypeError, match="lr = 'x'"):
        optimizer.step()


@backends
def test_a_closure_that_fails_counts_nothing(backend):
    first = weight()
    optimizer = optimizer_of([first], backend=backend, total_steps=9)
    steps(optimizer, [first], 0, 2)
    before = first.detach().clone()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.equal(first, before)
    assert optimizer.param_groups[0]["steps_done"] == 2


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_gradient_that_requires_gradients_and_a_weight_that_does_not_any_more():
    first, second = weight(), weight(seed=1)
    optimizer = optimizer_of([first, second], quantizer=None, momentum=0)
    (first**3).sum().backward(create_graph=True)
    wanted = first.detach() - 0.1 * first.grad.detach()
    optimizer.step()
    torch.testing.assert_close(first.detach(), wanted)
    first.grad = None
    second.requires_grad_(False)
    before = second.detach().clone()
    optimizer.step()
    assert torch.equal(second, before)


def test_deterministic_algorithms_with_filled_memory():
    torch.use_deterministic_algorithms(True)
    try:
        first = nn.Parameter(transposed(weight().detach()))
        optimizer = optimizer_of([first], quantizer="4bit/channel", outputs=["codes", "snapped"])
        steps(optimizer, [first], 0, 2)
        optimizer.finalize()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_weight_whose_storage_was_freed_is_refused():
    """As FSDP frees it between uses. Reading it would end the process."""
    for done in (0, 2):
        first, second = weight(), weight(seed=1)
        optimizer = optimizer_of([first, second])
        steps(optimizer, [first, second], 0, done)
        fill([first, second])
        value, storage = second.detach().clone(), second.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        for use in USES.values() if done else (USES["step"], USES["prepare"]):
            if use is USES["prepare"] and done:
                continue  # there is nothing to prepare
            with pytest.raises(ValueError, match=r"w1.* has no memory"):
                use(optimizer)
        gradient = first.grad.untyped_storage()
        storage.resize_(size)
        second.detach().copy_(value)
        gradient.resize_(0)
        with pytest.raises(ValueError, match=r"grads\[0\] \(w0\) has no memory"):
            optimizer.step()
