"""The step in Triton: the operations of ``csrc/maths/step.h``, in the same order, and the kernel that brings weights to
them and back.

The tags (E1)-(E7) are those of :mod:`askew_cuda.reference`, which explains the method. All arithmetic is float32;
divisions and roots are the rounded ones (``div_rn``, ``sqrt_rn``), and the launch forbids fused multiply-adds, so that
the bits are those of the other backends. Selects let a NaN through. :mod:`askew_cuda.triton.launch` says what is
launched.

Triton has no structs; these tuples go from function to function:

    grid: unit (weight units per unit of the codebook), 1 / unit
    book: unit (in level units), lowest level, highest level, then the index of the last level or, with CAPACITY, the
        table
    at:   a weight among its levels: index and value of the nearest, distance e to it, half the gap it lies in, the same
        in weight units
    h:    half-width inside, half-width outside, sqrt(epsilon), capture radius, rate, max_step, snap
"""

import triton
import triton.language as tl

from .storage import join, make_key, narrow, random_bits, split, stochastic, widen

# Columns of a tensor's row in the launch's table of int64 numbers; addresses that are not used are 0.
WEIGHT, GRAD, STATE, CODES, SNAPPED, REMAINDER, SCALE, GROWTH = (tl.constexpr(k) for k in (0, 1, 2, 5, 6, 7, 8, 9))
STREAM, FIRST_ELEMENT, SIZE, SCALE_RUN, SCALE_COUNT, OUTER_RUN, OUTER_COUNT, FIRST_BLOCK, ALIGNED, COLUMNS = (
    tl.constexpr(k) for k in range(10, 20)
)
# Rows of a table of levels: their values, the midpoints above them, then half the distance to the neighbour, and its
# inverse.
LEVELS, MIDPOINTS, BELOW, ABOVE, INVERSE_BELOW, INVERSE_ABOVE = (tl.constexpr(k) for k in range(6))


@triton.jit
def loaded(x, index):
    """A kernel argument: a number, or a pointer to float32 numbers, of which one is taken."""
    argument = x
    if argument.dtype.is_ptr():
        return tl.load(argument + index)
    else:
        return argument.to(tl.float32)


@triton.jit
def flip(x, sign):
    """x with its sign turned where ``sign`` is negative."""
    turned = x.to(tl.uint32, bitcast=True) ^ (sign.to(tl.uint32, bitcast=True) & 0x80000000)
    return turned.to(tl.float32, bitcast=True)


@triton.jit
def nearest(u, book, CAPACITY: tl.constexpr):
    """Index of the nearest level: a tie goes to the lower one, NaN to 0. By rounding, or by how many midpoints lie
    below u.
    """
    if CAPACITY == 0:
        lowest, top = book[1], book[3]
        x = u + (-lowest - 0.5)
        x = tl.where(x > 0, x, 0.0)
        x = tl.where(x < top, x, top)
        index = x.to(tl.int32)  # cut off: tl.ceil would take a subnormal number for zero
        index += (x > index.to(tl.float32)).to(tl.int32)
    else:
        index = tl.full(u.shape, 0, tl.int32)
        for k in tl.static_range(1, CAPACITY.bit_length()):
            midpoint = tl.load(book[3] + MIDPOINTS * CAPACITY + index + ((CAPACITY >> k) - 1))
            index += tl.where(u > midpoint, CAPACITY >> k, 0)
    return index


@triton.jit
def level_of(index, book, CAPACITY: tl.constexpr):
    if CAPACITY == 0:
        return index.to(tl.float32) + book[1]
    else:
        return tl.load(book[3] + LEVELS * CAPACITY + index)


@triton.jit
def beside(
    index, e, book, CAPACITY: tl.constexpr, UNIFORM: tl.constexpr, BELOW_ROW: tl.constexpr, ABOVE_ROW: tl.constexpr
):
    """What the table says of the gap that the weight lies in; e < 0: the one above its level. Uniform levels all have
    the same.
    """
    if CAPACITY == 0:
        return tl.full(e.shape, UNIFORM, tl.float32)
    else:
        return tl.load(book[3] + tl.where(e < 0, ABOVE_ROW * CAPACITY, BELOW_ROW * CAPACITY) + index)


@triton.jit
def locate(w, grid, book, CAPACITY: tl.constexpr):
    """A weight among its levels."""
    unit, inverse = grid
    index = nearest(w * inverse, book, CAPACITY)
    level = level_of(index, book, CAPACITY)
    e = unit * level - w
    gap = beside(index, e, book, CAPACITY, 0.5, BELOW, ABOVE)
    return index, level, e, gap, unit * gap


@triton.jit
def skew_capture(d, w, grid, book, h, CAPACITY: tl.constexpr):
    """(E2'), (E3'): the displacement of a weight under capture annealing."""
    capture_radius, rate, max_step, snap = h[1], h[2], h[3], h[4]
    at = locate(w, grid, book, CAPACITY)
    e, half = at[2], at[4]
    distance = tl.abs(e)
    cap = max_step * half
    pull = rate * distance
    pull = tl.where(pull < cap, pull, cap)
    pull = tl.where(distance <= snap * half, distance, pull)
    toward = flip(d, e)
    wanted = tl.where(toward > distance, distance, toward)
    move = tl.where(pull > wanted, pull, wanted)
    return tl.where(distance < capture_radius * half, flip(move, e), d)


@triton.jit
def skew_interval(d, w, grid, book, h, CAPACITY: tl.constexpr):
    """(E2), (E3): the displacement of a weight under the paper's interval annealing."""
    root, rate, max_step = h[0], h[2], h[3]
    lowest, highest = book[1], book[2]
    unit, inverse = grid
    index, _, e, _, half = locate(w, grid, book, CAPACITY)
    distance = tl.abs(e)
    inwards = tl.where(w < unit * lowest, -distance, distance)  # outside of the codebook it is negative
    inwards = tl.where(w > unit * highest, -distance, inwards)
    from_middle = half - inwards
    per_half = inverse * beside(index, e, book, CAPACITY, 2.0, INVERSE_BELOW, INVERSE_ABOVE)
    delta = inwards * per_half
    well = tl.abs(delta) * (2 - delta)
    pull = 0.25 * rate * half * (well - root) * (well + root)
    pull = tl.div_rn(pull, well * (from_middle * per_half))
    pull = tl.where(well > root, pull, float("-inf"))
    pull = tl.where(from_middle > 0, pull, float("-inf"))
    cap = max_step * half
    return tl.where(flip(d, e) < pull, flip(tl.where(pull < cap, pull, cap), e), d)


@triton.jit
def hyper(lr, epsilon, pull, CAPTURE: tl.constexpr, SKEW_GRADIENT: tl.constexpr, RATE_IS_ALPHA: tl.constexpr):
    """h, from the arguments. (E1) is in it: sqrt(epsilon), and 1 - r."""
    rate, max_step, snap = loaded(pull[0], 0), loaded(pull[1], 0), loaded(pull[2], 0)
    root = tl.sqrt_rn(epsilon)
    half_width = tl.div_rn(root, 1 + tl.sqrt_rn(1 - root))
    capture_radius = tl.where(1 - half_width < 1, 1 - half_width, float("inf"))
    if SKEW_GRADIENT:
        max_step = tl.div_rn(max_step, lr)  # the gradient is skewed per unit of lr
    elif RATE_IS_ALPHA:
        rate = lr * rate
    if CAPTURE:
        rate = tl.where(rate < 1, rate, 1.0)
    return root, capture_radius, rate, max_step, snap


@triton.jit
def sgd_displacement(g, w, buffer, lr, rule, DECAYS: tl.constexpr, STATES: tl.constexpr, NESTEROV: tl.constexpr):
    """(E4), SGD: the displacement and the new momentum buffer."""
    momentum, one_minus_dampening, weight_decay = loaded(rule[0], 0), loaded(rule[1], 0), loaded(rule[2], 0)
    if DECAYS:
        g = g + weight_decay * w
    if STATES:
        buffer = momentum * buffer + one_minus_dampening * g
        g = g + momentum * buffer if NESTEROV else buffer
    return -lr * g, buffer


@triton.jit
def adamw_displacement(g, w, mean, square, largest, lr, rule, tensor, AMSGRAD: tl.constexpr):
    """(E4), AdamW: the displacement and the new moments. The bias corrections are those of the tensor's step count."""
    beta1, one_minus_beta1, beta2, one_minus_beta2 = (
        loaded(rule[0], 0),
        loaded(rule[1], 0),
        loaded(rule[2], 0),
        loaded(rule[3], 0),
    )
    eps, weight_decay, first, second = (
        loaded(rule[4], 0),
        loaded(rule[5], 0),
        loaded(rule[6], tensor),
        loaded(rule[7], tensor),
    )
    mean = beta1 * mean + one_minus_beta1 * g
    square = beta2 * square + one_minus_beta2 * (g * g)
    largest = tl.where(largest > square, largest, square) if AMSGRAD else square
    direction = tl.div_rn(mean * first, tl.sqrt_rn(largest) * second + eps)
    return -lr * (direction + weight_decay * w), mean, square, largest


@triton.jit
def multiples(position, lane, period, BLOCK: tl.constexpr):
    """(position + lane) // period for 0 <= position < period and 0 <= lane < BLOCK, without an integer division per
    weight. What all lanes share is taken off; an n < 2 BLOCK is left, and (n + 1/2) / period is so far from integers
    that float32's errors don't count.
    """
    short = tl.minimum(period, BLOCK).to(tl.int32)
    to_next = tl.minimum(period - position, BLOCK).to(tl.int32)
    return (((lane - to_next + short).to(tl.float32) + 0.5) * tl.div_rn(1.0, short.to(tl.float32))).to(tl.int32)


@triton.jit
def number_of_scale(row, start, lane, BLOCK: tl.constexpr, PER_TENSOR: tl.constexpr):
    """Weight i has scale[(i // outer_run) % outer_count * count + (i // run) % count]."""
    if PER_TENSOR:
        return 0
    else:
        run, count = tl.load(row + SCALE_RUN), tl.load(row + SCALE_COUNT)
        first = (start // run) % count
        further = multiples(start % run, lane, run, BLOCK)
        inner = first + (further - multiples(first, further, count, BLOCK) * count)
        outer_run, outer_count = tl.load(row + OUTER_RUN), tl.load(row + OUTER_COUNT)
        before = (start // outer_run) % outer_count
        after = multiples(start % outer_run, lane, outer_run, BLOCK)
        outer = before + (after - multiples(before, after, outer_count, BLOCK) * outer_count)
        return outer * count + inner


@triton.jit
def clipped(moved, scale, grid, book):
    """(E5), the box. A scale of zero has no levels: its weights are free."""
    low = tl.where(scale > 0, grid[0] * book[1], float("-inf"))
    high = tl.where(scale > 0, grid[0] * book[2], float("inf"))
    moved = tl.where(moved < low, low, moved)
    return tl.where(moved > high, high, moved)


@triton.jit
def place(row, column, start, lane, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointers to a block of one of the tensors. Whole blocks lie at multiples of 16 bytes, and move 16 bytes at a
    time.
    """
    base = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if WHOLE:
        base = tl.multiple_of(base, 16)
    return base + start + lane


@triton.jit
def read(pointers, mask, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def write(pointers, x, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=mask)


@triton.jit
def read_state(
    row, start, lane, mask, g,
    WHOLE: tl.constexpr, STATE_TYPE: tl.constexpr, ADAMW: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """The state's parts; one that there is not is like g."""
    first, second, third = g, g, g
    if STATES >= 1:
        first = widen(read(place(row, STATE, start, lane, STATE_TYPE, WHOLE), mask, WHOLE))
    if ADAMW:
        second = widen(read(place(row, STATE + 1, start, lane, STATE_TYPE, WHOLE), mask, WHOLE))
    if STATES == 3:
        third = widen(read(place(row, STATE + 2, start, lane, STATE_TYPE, WHOLE), mask, WHOLE))
    return first, second, third


@triton.jit
def write_state(
    state, row, start, lane, mask,
    WHOLE: tl.constexpr, STATE_TYPE: tl.constexpr, ADAMW: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    if STATES >= 1:
        write(place(row, STATE, start, lane, STATE_TYPE, WHOLE), narrow(state[0], STATE_TYPE), mask, WHOLE)
    if ADAMW:
        write(place(row, STATE + 1, start, lane, STATE_TYPE, WHOLE), narrow(state[1], STATE_TYPE), mask, WHOLE)
    if STATES == 3:
        write(place(row, STATE + 2, start, lane, STATE_TYPE, WHOLE), narrow(state[2], STATE_TYPE), mask, WHOLE)


@triton.jit
def base_rule(
    g, w, state, tensor, lr, rule,
    ADAMW: tl.constexpr, STATES: tl.constexpr, DECAYS: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """(E4): the displacement and the new state."""
    first, second, third = state
    if ADAMW:
        d, first, second, third = adamw_displacement(g, w, first, second, third, lr, rule, tensor, STATES == 3)
    else:
        d, first = sgd_displacement(g, w, first, lr, rule, DECAYS, STATES, NESTEROV)
    return d, (first, second, third)


@triton.jit
def step_block(
    row, tensor, start, lr, grad_factor, h, book, rule, key,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, WEIGHT_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr, SNAPPED_TYPE: tl.constexpr, ROUNDING: tl.constexpr,
    CODED: tl.constexpr, ADAMW: tl.constexpr, STATES: tl.constexpr, DECAYS: tl.constexpr, NESTEROV: tl.constexpr,
    QUANTIZED: tl.constexpr, GROWS: tl.constexpr, CAPACITY: tl.constexpr, PER_TENSOR: tl.constexpr,
    CAPTURE: tl.constexpr, SKEW_GRADIENT: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """One step of a block of one tensor: loads, (E1)-(E7), stores."""
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.load(row + SIZE) - start
    weights = place(row, WEIGHT, start, lane, WEIGHT_TYPE, WHOLE)
    remainders = place(row, REMAINDER, start, lane, tl.int16, WHOLE)
    stored = read(weights, mask, WHOLE)
    g = widen(read(place(row, GRAD, start, lane, GRAD_TYPE, WHOLE), mask, WHOLE)) * grad_factor
    state = read_state(row, start, lane, mask, g, WHOLE, STATE_TYPE, ADAMW, STATES)  # before anything waits for a scale
    w = join(stored, read(remainders, mask, WHOLE), WEIGHT_TYPE) if ROUNDING == "remainder" else widen(stored)
    if QUANTIZED:
        number = number_of_scale(row, start, lane, BLOCK, PER_TENSOR)
        scale = tl.load(tl.load(row + SCALE).to(tl.pointer_type(tl.float32)) + number)
        if GROWS:  # (E7)
            growth = tl.load(tl.load(row + GROWTH).to(tl.pointer_type(tl.float32)) + number)
            w, scale = w * growth, scale * growth
        unit = scale * book[0]
        grid = (unit, tl.div_rn(1.0, unit))
        if SKEW_GRADIENT:
            g = tl.where(lr != 0, -skew_interval(-g, w, grid, book, h, CAPACITY), g)
    d, state = base_rule(g, w, state, tensor, lr, rule, ADAMW, STATES, DECAYS, NESTEROV)
    write_state(state, row, start, lane, mask, WHOLE, STATE_TYPE, ADAMW, STATES)
    if QUANTIZED and not SKEW_GRADIENT:
        d = skew_capture(d, w, grid, book, h, CAPACITY) if CAPTURE else skew_interval(d, w, grid, book, h, CAPACITY)
    moved = w + d
    if CLIP:
        moved = clipped(moved, scale, grid, book)
    moved = tl.where(lr != 0, moved, w)
    if ROUNDING == "remainder":
        stored, remainder = split(moved, WEIGHT_TYPE)
        write(remainders, remainder, mask, WHOLE)
    elif ROUNDING == "stochastic":
        random = random_bits(key, tl.load(row + FIRST_ELEMENT) + start + lane)
        stored = stochastic(moved, random, WEIGHT_TYPE)
    else:
        stored = narrow(moved, WEIGHT_TYPE)
    write(weights, stored, mask, WHOLE)
    if CODED or SNAPPED_TYPE is not None:  # (E6), from what the storage made of the weight
        kept = widen(stored)
        index = nearest(kept * grid[1], book, CAPACITY)
        if CODED:
            write(place(row, CODES, start, lane, tl.uint8, WHOLE), index.to(tl.uint8), mask, WHOLE)
        if SNAPPED_TYPE is not None:
            level = grid[0] * level_of(index, book, CAPACITY)
            snapped = narrow(tl.where(kept == kept, level, kept), SNAPPED_TYPE)  # NaN has none
            write(place(row, SNAPPED, start, lane, SNAPPED_TYPE, WHOLE), snapped, mask, WHOLE)


@triton.jit(
    do_not_specialize=["table", "owner", "lr", "epsilon", "grad_scale", "found_inf", "pull", "book", "rule", "seed"]
)
def step_kernel(
    table, owner, lr, epsilon, grad_scale, found_inf, pull, book, rule, seed,
    BLOCK: tl.constexpr, MAXIMIZE: tl.constexpr, RATE_IS_ALPHA: tl.constexpr, WEIGHT_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr, STATE_TYPE: tl.constexpr, SNAPPED_TYPE: tl.constexpr, ROUNDING: tl.constexpr,
    CODED: tl.constexpr,
    ADAMW: tl.constexpr, STATES: tl.constexpr, DECAYS: tl.constexpr, NESTEROV: tl.constexpr, QUANTIZED: tl.constexpr,
    GROWS: tl.constexpr, CAPACITY: tl.constexpr, PER_TENSOR: tl.constexpr, CAPTURE: tl.constexpr,
    SKEW_GRADIENT: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """One step of all tensors of a list, a block of BLOCK weights in each program; found_inf != 0 leaves everything as
    it is.

    Args:
        table: (tensors, COLUMNS) int64, a row per tensor. owner: (programs,) int32, the tensor that a program's block
            lies in.
        lr, epsilon, grad_scale, found_inf: numbers, or pointers to float32 numbers.
        pull: (rate, max_step, snap). book: see above. rule: the settings of SGD or AdamW, in the order that they are
            unpacked.
        seed: of stochastic rounding, in three pieces of 21 bits; or (a pointer to int64, 0, 0).
    """
    if loaded(found_inf, 0) == 0:
        program = tl.program_id(0)
        tensor = tl.load(owner + program)
        row = table + tensor * COLUMNS
        start = (program - tl.load(row + FIRST_BLOCK)) * BLOCK
        whole = (tl.load(row + ALIGNED) != 0) & (start + BLOCK <= tl.load(row + SIZE))
        lr_value = loaded(lr, 0)
        grad_factor = tl.div_rn(-1.0 if MAXIMIZE else 1.0, loaded(grad_scale, 0))
        h = hyper(lr_value, loaded(epsilon, 0), pull, CAPTURE, SKEW_GRADIENT, RATE_IS_ALPHA)
        key = make_key(seed, tl.load(row + STREAM), ROUNDING)
        if whole:
            step_block(
                row, tensor, start, lr_value, grad_factor, h, book, rule, key, BLOCK, True, WEIGHT_TYPE, GRAD_TYPE,
                STATE_TYPE, SNAPPED_TYPE, ROUNDING, CODED, ADAMW, STATES, DECAYS, NESTEROV, QUANTIZED, GROWS, CAPACITY,
                PER_TENSOR, CAPTURE, SKEW_GRADIENT, CLIP,
            )  # fmt: skip
        else:
            step_block(
                row, tensor, start, lr_value, grad_factor, h, book, rule, key, BLOCK, False, WEIGHT_TYPE, GRAD_TYPE,
                STATE_TYPE, SNAPPED_TYPE, ROUNDING, CODED, ADAMW, STATES, DECAYS, NESTEROV, QUANTIZED, GROWS, CAPACITY,
                PER_TENSOR, CAPTURE, SKEW_GRADIENT, CLIP,
            )  # fmt: skip
