// START HERE. One weight, one step: base rule, skew, move, code. Everything else in csrc/ brings numbers here and back.
//
// P is a float, a double, or a SIMD pack of them (pack.h); T is the type of one number. h holds the scalars of the step
// (settings.h). The tags (E1)-(E7) are those of askew_cuda/reference.py, which explains the method and states the same
// operations in PyTorch. Every operation is an IEEE operation that rounds once, in the order written here, and no
// multiply-add is fused (build flags): all backends agree bit for bit. `a < b ? a : b` returns b when either is NaN;
// every select below, and every smaller or larger number, is chosen so that a NaN gradient, or weight, comes out as
// NaN.
//
// Source: Leconte, Schechtman, Moulines, "ASkewSGD", AISTATS 2023; velocity constraints of Muehlebach & Jordan, JMLR
// 23, 2022.
#pragma once

#include "settings.h"

namespace askew {

// (E1) Half-width of the feasible interval around a level, inside the codebook; root = sqrt(epsilon).
template <typename T> ASKEW_FN T half_width(T root) { return root / (1 + sqrt(1 - root)); }

// What follows from half the distance between the two levels around a weight.
template <typename P>
struct Reach {
  P half;    // in weight units: r_h
  P cap;     // the largest pull
  P snap;    // (E2'): from this distance on the pull goes all the way
  P radius;  // (E3'): of capture
  P pull;    // (E2): a r_h / 4

  static ASKEW_FN Reach of(P half, const Hyper<P>& h) {
    const Now<P>& now = h.now;
    return {half, now.max_step * half, now.snap * half, now.capture_radius * half, now.quarter_rate * half};
  }
};

// What all weights under one scale share.
template <typename P>
struct Grid {
  P unit;          // weight units per unit of the codebook
  P inverse;       // 1 / unit
  P first, last;   // the outermost levels
  P low, high;     // the box: outermost levels, or infinities where nothing is clipped
  P growth;        // (E7): f, where h.learns
  Reach<P> reach;  // of levels at one distance
};

template <typename P, typename Codebook>
ASKEW_FN Grid<P> make_grid(P scale, P growth, const Codebook& codebook, const Hyper<P>& h) {
  using T = Lane<P>;
  if (h.learns) scale = scale * growth;
  const P infinity = broadcast(T(INFINITY), scale);
  const P unit = scale * codebook.unit;
  Grid<P> grid{unit, T(1) / unit, unit * codebook.lowest(), unit * codebook.highest(), -infinity, infinity, growth, {}};
  if constexpr (Codebook::even) grid.reach = Reach<P>::of(unit * T(0.5), h);
  if (h.clip) {  // a scale of zero has no levels: its weights are free
    grid.low = scale > T(0) ? grid.first : -infinity;
    grid.high = scale > T(0) ? grid.last : infinity;
  }
  return grid;
}

// A weight among its levels.
template <typename P, typename IndexType>
struct Place {
  IndexType index;  // of the nearest level
  P e;              // signed distance to it, q - w; weight units
  Reach<P> reach;
};

// Where a weight is looked for among the levels: in units of the codebook.
template <typename P>
ASKEW_FN P position(P w, const Grid<P>& grid, const Hyper<P>& h) {
  return (h.learns ? w * grid.growth : w) * grid.inverse;
}

template <typename P, typename Codebook>
ASKEW_FN auto locate(P w, const Grid<P>& grid, const Codebook& codebook, const Hyper<P>& h) {
  Place<P, decltype(codebook.nearest(w))> at;
  at.index = codebook.nearest(w * grid.inverse);
  at.e = grid.unit * codebook.level(at.index) - w;
  if constexpr (Codebook::even && !std::is_arithmetic_v<P>)  // a thread of a GPU has time, but no registers for it
    at.reach = grid.reach;
  else
    at.reach = Reach<P>::of(grid.unit * codebook.gap(at.index, at.e), h);
  return at;
}

// (E2'), (E3') Displacement of a weight under capture annealing: within the capture radius of its level it goes there,
// at the recovery rate or as fast as the base rule when that goes there too, and never past it. Others move as the base
// rule says.
struct Capture {
  static constexpr bool on_gradient = false;

  template <typename P, typename At, typename Codebook>
  static ASKEW_FN P skew(P d, P, const At& at, const Grid<P>&, const Codebook&, const Hyper<P>& h) {
    const P distance = abs(at.e);
    P pull = at_most(h.now.rate * distance, at.reach.cap);
    pull = distance <= at.reach.snap ? distance : pull;  // the last bit of the way: exactly onto the level
    const P toward = flip(d, at.e);
    const P wanted = no_more(toward, distance);
    const P move = pull > wanted ? pull : wanted;
    return distance < at.reach.radius ? flip(move, at.e) : d;
  }
};

// (E2), (E3) Displacement under the paper's interval annealing: a feasible weight moves as the base rule says, an
// infeasible one only where that heals the violation at least as fast as the pull; otherwise it is pulled towards its
// nearest level.
struct Interval {
  static constexpr bool on_gradient = true;  // where h.skew_gradient asks for it

  template <typename P, typename At, typename Codebook>
  static ASKEW_FN P skew(P d, P w, const At& at, const Grid<P>& grid, const Codebook& codebook, const Hyper<P>& h) {
    using T = Lane<P>;
    const P distance = abs(at.e), nothing = broadcast(T(-INFINITY), d);
    P inwards = w < grid.first ? -distance : distance;  // outside of the codebook it is negative
    inwards = w > grid.last ? -distance : inwards;
    const P from_middle = at.reach.half - inwards;
    const P per_half = grid.inverse * codebook.inverse_gap(at.index, at.e);
    const P delta = inwards * per_half;
    const P well = abs(delta) * (T(2) - delta);  // |t^2 - 1|
    P pull = at.reach.pull * (well - h.now.root) * (well + h.now.root) / (well * (from_middle * per_half));  // (E2)
    pull = well > h.now.root ? pull : nothing;
    pull = from_middle > T(0) ? pull : nothing;
    return flip(d, at.e) < pull ? flip(pull < at.reach.cap ? pull : at.reach.cap, at.e) : d;  // (E3); NaN is kept
  }
};

// (E4) The base rules, torch's formulas: the state moves, the displacement comes back.
struct Sgd {
  static constexpr int states = 1;  // momentum_buffer, absent (and zero here) without momentum

  template <typename P>
  static ASKEW_FN P displacement(P g, P w, P (&state)[1], const Hyper<P>& h) {
    P& buffer = state[0];
    if (h.decays) g = g + h.weight_decay * w;
    if (h.has_momentum) {
      buffer = h.momentum * buffer + (h.dampens ? h.one_minus_dampening * g : g);
      g = h.nesterov ? g + h.momentum * buffer : buffer;
    }
    return h.now.minus_lr * g;
  }
};

struct AdamW {
  static constexpr int states = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq (absent without amsgrad)

  template <typename P>
  static ASKEW_FN P displacement(P g, P w, P (&state)[3], const Hyper<P>& h) {
    P& mean = state[0];
    P& square = state[1];
    P& largest = state[2];
    mean = h.beta1 * mean + h.one_minus_beta1 * g;
    square = h.beta2 * square + h.one_minus_beta2 * (g * g);
    largest = !h.amsgrad ? square : largest > square ? largest : square;
    const P direction = (mean * h.now.bias1) / (sqrt(largest) * h.now.bias2 + h.eps);
    return h.now.minus_lr * (direction + h.weight_decay * w);
  }
};

// One step of one weight: its new value; `state` moves along. lr = 0 moves no weight, the box included.
template <typename Rule, typename Annealing, typename P, typename Codebook>
ASKEW_FN P step(P w, P g, P (&state)[Rule::states], const Grid<P>& grid, const Codebook& codebook, const Hyper<P>& h) {
  if (h.now.unscales) g = g * h.now.grad_factor;
  if constexpr (Codebook::quantized) {
    if (h.learns) w = w * grid.growth;
  }
  if constexpr (Codebook::quantized && Annealing::on_gradient) {
    if (h.skew_gradient && h.now.moves) g = -Annealing::skew(-g, w, locate(w, grid, codebook, h), grid, codebook, h);
  }
  P d = Rule::displacement(g, w, state, h);
  if (!h.now.moves) return w;
  if constexpr (!Codebook::quantized)
    return w + d;
  else {
    if (!(Annealing::on_gradient && h.skew_gradient))
      d = Annealing::skew(d, w, locate(w, grid, codebook, h), grid, codebook, h);
    P moved = w + d;  // (E5)
    moved = moved < grid.low ? grid.low : moved;
    return moved > grid.high ? grid.high : moved;
  }
}

}  // namespace askew
