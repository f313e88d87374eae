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

// (E1) Half-widths of the feasible interval around a level, inside the codebook and outside of it; root =
// sqrt(epsilon).
template <typename T> ASKEW_FN T half_width_inside(T root) { return root / (1 + sqrt(1 - root)); }
template <typename T> ASKEW_FN T half_width_outside(T root) { return root / (1 + sqrt(1 + root)); }

// What all weights under one scale share.
template <typename P>
struct Grid {
  P unit;       // weight units per unit of the codebook
  P inverse;    // 1 / unit
  P low, high;  // the box: outermost levels, or infinities where nothing is clipped
  P growth;     // (E7): f, where h.learns
};

template <typename P, typename Codebook>
ASKEW_FN Grid<P> make_grid(P scale, P growth, const Codebook& codebook, const Hyper<P>& h) {
  using T = Lane<P>;
  if (h.learns) scale = scale * growth;
  const P infinity = broadcast(T(INFINITY), scale);
  const P unit = scale * codebook.unit;
  Grid<P> grid{unit, T(1) / unit, -infinity, infinity, growth};
  if (h.clip) {  // a scale of zero has no levels: its weights are free
    grid.low = scale > T(0) ? unit * codebook.lowest() : -infinity;
    grid.high = scale > T(0) ? unit * codebook.highest() : infinity;
  }
  return grid;
}

// A weight among its levels.
template <typename P, typename IndexType>
struct Place {
  IndexType index;  // of the nearest level
  P level;          // its value, units of the codebook
  P e;              // signed distance to it, q - w; weight units
  P gap;            // half the distance between the two levels around the weight, units of the codebook
  P half;           // the same in weight units: r_h
};

template <typename P, typename Codebook>
ASKEW_FN auto locate(P w, const Grid<P>& grid, const Codebook& codebook) {
  Place<P, decltype(codebook.nearest(w))> at;
  at.index = codebook.nearest(w * grid.inverse);
  at.level = codebook.level(at.index);
  at.e = grid.unit * at.level - w;
  at.gap = codebook.gap(at.index, at.e);
  at.half = grid.unit * at.gap;
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
    const P cap = h.now.max_step * at.half;
    P pull = at_most(h.now.rate * distance, cap);
    pull = distance <= h.now.snap * at.half ? distance : pull;  // the last bit of the way: exactly onto the level
    const P toward = flip(d, at.e);
    const P wanted = no_more(toward, distance);
    const P move = pull > wanted ? pull : wanted;
    return distance < h.now.capture_radius * at.half ? flip(move, at.e) : d;
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
    const P distance = abs(at.e);
    const auto outside =
        ((at.level == codebook.lowest()) & (at.e > T(0))) | ((at.level == codebook.highest()) & (at.e < T(0)));
    const P middle = grid.unit * (at.level - flip(at.gap, at.e));
    const P from_middle = outside ? distance + at.half : abs(w - middle);
    const P per_half = grid.inverse * codebook.inverse_gap(at.index, at.e);
    const P delta = distance * per_half;
    const P t = from_middle * per_half;               // |t|
    const P signed_delta = outside ? -delta : delta;  // sigma delta
    const P width = outside ? h.now.half_width_outside : h.now.half_width;
    const P signed_width = outside ? -width : width;
    const P well = delta * (T(2) - signed_delta);
    const P pull = h.now.rate * at.half * T(0.25) * (delta - width) * (T(2) - (signed_delta + signed_width)) *
                   (well + h.now.root) / (well * t);  // (E2)
    const P cap = h.now.max_step * at.half;
    const P toward = flip(d, at.e);
    const auto keep = (delta <= width) | (from_middle == T(0)) | !(toward < pull);  // (E3); the last also keeps a NaN
    return keep ? d : flip(pull < cap ? pull : cap, at.e);
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
    if (h.skew_gradient && h.now.moves) g = -Annealing::skew(-g, w, locate(w, grid, codebook), grid, codebook, h);
  }
  P d = Rule::displacement(g, w, state, h);
  if (!h.now.moves) return w;
  if constexpr (!Codebook::quantized)
    return w + d;
  else {
    if (!(Annealing::on_gradient && h.skew_gradient))
      d = Annealing::skew(d, w, locate(w, grid, codebook), grid, codebook, h);
    P moved = w + d;  // (E5)
    moved = moved < grid.low ? grid.low : moved;
    return moved > grid.high ? grid.high : moved;
  }
}

}  // namespace askew
