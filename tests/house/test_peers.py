"""What goes wrong elsewhere: defects of the closest rival (torchao's PARQ, 0.18) and what users of optimizers and of
quantized training complain about. Each has the test that keeps it out of here, or the reason why there is none.
"""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import askew_cuda as askew
from askew_cuda import backends
from askew_cuda.look import codes
from askew_cuda.quantizer import Codebook

# What went wrong -> the test here.
DEFECTS = {
    "PARQ: a fused base under GradScaler never unscales": "test_the_scale_is_divided_out_and_gradients_are_left_alone",
    "PARQ: the same path steps on infinities": "test_an_overflow_leaves_everything_as_it_is",
    "PARQ: a closure sees other weights": "test_closure_sees_the_trained_weights_and_its_loss_is_returned",
    "PARQ: channels_last weights are silently not quantized": "test_memory_order_changes_nothing",
    "PARQ: group scales on two dimensions only": "test_memory_order_changes_nothing",
    "PARQ: one NaN or infinite gradient spoils the tensor for ever": "test_bad_gradients_stay_with_their_weights",
    "PARQ: max scale at 1 bit gives NaN weights": "test_every_rule_gives_every_codebook_a_finite_scale",
    "PARQ: a wrong bit width is a TypeError about torch.empty": "test_wrong_keywords",
    "PARQ: add_param_group is a KeyError": "test_group_overrides_and_groups_that_come_later",
    "PARQ: a float checkpoint does not load": "test_quantized_training_starts_from_the_checkpoint_of_a_float_run",
    "PARQ: its checkpoint leaves stray state in torch's optimizer": "test_torch_goes_on_from_our_checkpoint",
    "PARQ: resuming is exact, and must be": "test_a_resumed_run_is_the_run_that_was_not_cut",
    "PARQ: 'optimal' is worse than greedy": "test_min_mse_is_within_one_per_cent",
    "PARQ: an asymmetric codebook does not hold its own weights": "test_no_level_is_nearer",
    "PARQ: quantized weights are off their codebook by ulps": "test_codes_and_snapped_weights_are_those_of_a_step",
    "PARQ: a stale codebook between its periods": "test_outputs_are_what_quantized_parameters_gives",
    "PARQ: the exported model is not the trained one": "test_outputs_are_those_of_the_snapped_model",
    "PARQ: binary, ternary not exported": "test_every_codebook_granularity_and_dtype_comes_back_to_the_last_bit",
    "PARQ: three graphs, and a schedule of floats": "test_a_training_step_is_two_graphs_for_ever",
    "PARQ: a latent copy of every weight": "test_state_has_torchs_names_dtypes_and_shapes",
    "PARQ: no way to evaluate with quantized weights": "test_quantized_snaps_inside_and_restores_outside",
    "PARQ: updates that 16-bit weights lose": "test_small_steps_are_lost_kept_by_chance_or_kept",
    "PARQ: schedulers and step hooks work, and must": "test_a_schedule_does_what_it_does_for_torch",
    "torch: fused SGD skips vectors of 16-bit weights (pytorch#191763)": "test_the_cpu_does_what_the_reference_does",
    "torch: momentum from uninitialised memory (DeepSpeed#8432)": "test_an_overflow_leaves_everything_as_it_is",
}
COMPLAINTS = {
    "AMP with clipping (pytorch-lightning#15501, #21435)": "test_explicit_unscaling_and_clipping",
    "objects in param groups break checkpoints (ao#2743, #2770, #3104)": "test_param_groups_hold_plain_values",
    "state of another shape (bitsandbytes#89, #1403, #1732)": "test_state_has_the_weights_shape_or_is_its_scale",
    "sharded state and stochastic rounding on DTensors (ao#1505)": "test_shards_step_as_the_whole_weight",
    "sharded checkpoints (ao#2743, bitsandbytes#1732)": "test_a_run_of_two_ranks_goes_on_on_one_and_on_three",
    "checkpoints fail at the end of the run (ao#1185, #1189)": "test_param_groups_hold_plain_values",
    "it is not an Optimizer (ao#959)": "test_a_subclass_is_an_optimizer_of_its_own_name",
    "frozen weights crash (ao#1209)": "test_none_gradients_and_frozen_weights_are_left_alone",
    "a schedule recompiles (ao#730; pytorch#107076, #133898)": "test_a_training_step_is_two_graphs_for_ever",
    "it does not run without a compiler (ao#955, apex#1193, #323, DeepSpeed#1077, #1846)": (
        "test_without_the_compiled_extension_the_reference_steps_and_says_so"
    ),
    "errors of a binary that does not fit (ao#2908, sglang#30562, bitsandbytes#427)": (
        "test_doctor_names_what_is_here_and_why_the_rest_is_not"
    ),
    "no CPU (bitsandbytes#1226, #1402)": "test_the_cpu_does_what_the_reference_does",
    "peak memory (pytorch#97712)": "test_a_step_allocates_no_memory_for_weights",
    "capturable (pytorch#118018, dion#104)": "test_what_capturable_differentiable_and_fused_mean",
    "which layers does it touch? (larq#183, #306)": (
        "test_one_specification_leaves_out_embeddings_norms_first_and_last_layer"
    ),
    "overrides that do not override (bitsandbytes#1269)": "test_wrong_rules",
    "EMA (parameter-golf#760)": "test_averages_are_of_trained_weights_and_can_be_quantized",
    "NaN at few bits (brevitas#430)": "test_a_nan_gradient_spoils_its_own_weight_and_its_code_is_zero",
    "the wrong weights were saved (schedule_free#22, #48; accelerate#4130, #4161)": (
        "test_inside_quantized_a_step_is_refused_and_a_checkpoint_is_the_same"
    ),
    "a state of torch.optim does not load (apex#577)": "test_checkpoints_of_older_versions_lack_keywords",
    "fused=None from an old checkpoint (ultralytics#25375)": "test_how_a_machine_computes_is_not_loaded",
    "empty groups and step counters (TransformerEngine#3318)": "test_groups_of_nothing_and_of_empty_weights_alone",
    "importing needs Triton (triton#6150)": "test_importing_the_package_takes_torch_and_nothing_heavy",
    "no flip rate, no occupancy (larq#364)": "test_a_sample_by_hand",
    "bf16 needs stochastic rounding or Kahan sums (pytorch#120376, bitsandbytes#1165, Adam-mini#26)": (
        "test_with_remainders_bfloat16_trains_as_float32_does"
    ),
    "training from the quantized file (MiniCPM#301)": "test_training_goes_on_from_the_file_and_ends_on_levels_again",
}
# What no test here can keep out.
ELSEWHERE = {
    "PARQ: the optimal scale is a loop over elements, steps move 98 to 541 bytes per weight": "speed: benchmarks/",
    "one wheel for several torch versions (kernels-community#532, TransformerEngine#2812)": "packaging",
    "training is slow (brevitas#237)": "speed: benchmarks/",
}


TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("table", [DEFECTS, COMPLAINTS], ids=["defects", "complaints"])
def test_every_one_has_a_test_that_is_there(table):
    trees = [ast.parse(path.read_text()) for path in TESTS.glob("**/test_*.py")]
    there = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not {what: name for what, name in table.items() if name not in there}
    assert not set(table) & set(ELSEWHERE)


@pytest.mark.parametrize("rule", ["auto", "absmean", "absmax", "mse"])
@pytest.mark.parametrize(
    "name", ["binary", "ternary", "2bit", "8bit", "int2", "int8", "nf4", "fp4", "pow2", "authors_4bit"]
)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_rule_gives_every_codebook_a_finite_scale(rule, name, granularity):
    weight = nn.Parameter(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)))
    weight.grad = torch.zeros(4, 9)
    quantizer = askew.Quantizer(name, scale=rule, granularity=granularity)
    optimizer = askew.AskewSGD([weight], lr=0.1, quantizer=quantizer, pretrained=True)
    optimizer.step()
    scale = optimizer.state[weight]["scale"]
    assert ((scale > 0) & scale.isfinite()).all()
    assert weight.isfinite().all()
    assert len(codes(weight, scale, Codebook.named(name).levels).unique()) > 1


@pytest.mark.parametrize("ours", [askew.AskewSGD, askew.AskewAdamW])
def test_state_has_the_weights_shape_or_is_its_scale(ours):
    """What sharded checkpoints can gather; codes and snapped weights lie beside it."""
    weight = nn.Parameter(torch.randn(4, 6))
    weight.grad = torch.ones(4, 6)
    keywords = {"momentum": 0.9} if ours is askew.AskewSGD else {"amsgrad": True}
    optimizer = ours([weight], quantizer="4bit/group3", pretrained=True, outputs=("codes", "snapped"), **keywords)
    optimizer.step()
    shapes = {key: tuple(value.shape) for key, value in optimizer.state[weight].items()}
    assert shapes.pop("scale") == (4, 2)
    assert shapes.pop("step", ()) == ()
    assert set(shapes.values()) == {(4, 6)}
    assert set(optimizer.outputs[weight]) == {"codes", "snapped"}


class Largest(TorchDispatchMode):
    """The most elements that any operation but the step itself returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not built")
@pytest.mark.parametrize("ours", [askew.AskewSGD, askew.AskewAdamW])
def test_a_step_allocates_no_memory_for_weights(ours):
    weights = [nn.Parameter(torch.randn(20, 30)) for _ in range(3)]
    optimizer = ours(
        [{"params": weights[:2], "quantizer": "2bit/channel", "outputs": ["codes"]}, {"params": weights[2:]}],
        pretrained=True,
    )
    for weight in weights:
        weight.grad = torch.randn(20, 30)
    with Largest() as first:
        optimizer.step()
    with Largest() as second:
        optimizer.step()
    assert first.elements >= 600  # scales, moments and codes come to be
    assert second.elements <= 1  # numbers
