// The scale of least squared error: which scales are tried for a row of weights, and which of them is taken.
//
// At a scale s a weight w lies d = w / s - q from its nearest level q. Of all scales for that assignment of weights to
// levels s (1 + D / B) is the best one, where D = sum d q and B = sum q^2, and it leaves the error s^2 (R - D^2 / B),
// where R = sum d^2. So a trial is three sums, in the order of order.h, and the best trial is the one that leaves
// least. They are sums of small numbers, not the difference of large ones, so the lanes add them up in the type of
// arithmetic on the weights. Scales are in units of the codebook here: weight units per unit. askew_cuda/fit.py states
// the same in PyTorch.
//
// In the end the scale is that of least squares for its own assignment, twice: A / B, where A = sum w q, in double, so
// that weights that lie on levels already get the scale that put them there.
//
// The grid is geometric, from beyond where the largest weight lies on the outermost level down to below where the mean
// one would: the best scale is nowhere else. Around the best trial lies a finer grid. How many trials 1 % takes, and
// how wide the finer grid must be, was measured: the error of few weights on many levels is jagged.
#pragma once

#include "codebook.h"
#include "order.h"

namespace askew {

struct Sums {
  double error, along, square;  // R, D, B of a trial; of least squares nothing, A, B

  ASKEW_FN void add(const Sums& more) {
    error += more.error;
    along += more.along;
    square += more.square;
  }
};

// Scales that are tried one after another: first, first * ratio, ..
struct Sequence {
  double first, ratio;
  int count;
  bool least_squares;  // no trial: A and B are wanted at this scale

  ASKEW_FN void write(double* scales) const {
    double scale = first;
    for (int k = 0; k < count; ++k, scale *= ratio) scales[k] = scale;
  }
};

// What a search has to know of a row.
struct Range {
  double up, down;  // largest weight and largest -weight, at least 0
  double total;     // sum |w|
};

// How fine the grids are. The coarse one, of 2^roots / 3 + 2 trials, has a ratio of (low / high)^(3 / 2^roots).
struct Grids {
  int roots;
  double reach;  // the first trial, in units of the scale at which the largest weight lies on the outermost level
  double least;  // the last one, in units of that at which the mean |weight| does
  double first, ratio;  // the finer grid: its first trial, in units of the best one so far, and the ratio of its trials
  int fine;

  ASKEW_FN int coarse() const { return (1 << roots) / 3 + 2; }
  ASKEW_FN int most() const { return coarse() > fine ? coarse() : fine; }
};
constexpr int most_trials = 343;

ASKEW_FN Grids grids_for(Levels levels, int64_t columns) {
  const bool few = levels.count <= 17, aside = levels.values[0] > 0 || levels.values[levels.count - 1] < 0;
  const double least = aside ? 0.005 : 0.5;  // where all levels have one sign, weights of the other one ask for less
  const bool even = few && !aside && is_uniform(levels);
  if (even && levels.count <= 4) return {6, 2, least, 0.87, 1.025, 12};
  if (even && columns >= 128) return {6, 2, least, 0.8333, 1.018, 22};
  if (even) return {7, 2, least, 0.8333, 1.0147, 26};
  if (few) return {8, 4, least, 0.8333, 1.0147, 26};
  if (columns >= 1 << 14) return {7, 2, least, 0.8333, 1.0058, 64};
  if (columns >= 1 << 10) return {7, 2, least, 0.92, 1.002, 84};
  if (columns >= 64) return {9, 2, least, 0.87, 1.0011, 256};
  return {10, 4, least, 0.909, 1.00075, 256};
}

// What all rows of a call share.
struct Fitting {
  Grids grids;
  double per_unit;     // level units per unit of the codebook
  double first, last;  // the outermost levels, in units of the codebook
  double columns;
};

ASKEW_FN Fitting fitting(Levels levels, int64_t columns) {
  const double per_unit = is_uniform(levels) ? levels.values[1] - levels.values[0] : 1;
  return {grids_for(levels, columns), per_unit, levels.values[0] / per_unit, levels.values[levels.count - 1] / per_unit,
          static_cast<double>(columns)};
}

struct Search {
  static constexpr int phases = 5;  // the largest weight on the outermost level; two grids; least squares, twice
  Fitting fit;
  double largest, outermost, high, ratio, per_largest;
  double least, best;  // of the trials so far: the error that is left, and the scale; 0: none takes anything off it

  static ASKEW_FN Search of(const Fitting& fit, Range range) {
    const double first = fit.first, last = fit.last;
    const double largest = range.up > range.down ? range.up : range.down, outermost = -first > last ? -first : last;
    const double above = last > 0 ? range.up / last : 0, below = first < 0 ? range.down / -first : 0;
    double high = fit.grids.reach * (above > below ? above : below);
    if (!(high > 0)) high = 1;
    const double mean = fit.grids.least * (range.total / fit.columns) / outermost, quarter = 0.25 * high;
    double root = (mean < quarter ? mean : quarter) / high;
    for (int k = 0; k < fit.grids.roots; ++k) root = sqrt(root);
    return {fit, largest, outermost, high, root * root * root, 1 / largest, INFINITY, 0};
  }

  ASKEW_FN Sequence trials(int phase) const {
    if (phase == 0) return {largest / outermost, 1, 1, false};
    if (phase == 1) return {high, ratio, fit.grids.coarse(), false};
    const double middle = best > 0 ? best : high;
    if (phase == 2) return {middle * fit.grids.first, fit.grids.ratio, fit.grids.fine, false};
    return {middle, 1, 1, true};
  }

  // The error that a trial leaves, in squares of the largest weight; infinity: it takes nothing off.
  ASKEW_FN double left(double unit, const Sums& sums) const {
    const double part = unit * per_largest;  // so that no square leaves the range of a double
    const double error = part * part * (sums.error - sums.along * (sums.along / sums.square));
    return (sums.square > 0) & (sums.square + sums.along > 0) ? error : INFINITY;
  }
  ASKEW_FN void take(double unit, const Sums& sums, double left) {
    if (left < least) {
      least = left;
      best = unit + unit * (sums.along / sums.square);
    }
  }

  ASKEW_FN void take_least_squares(const Sums& sums) {
    best = sums.along > 0 && sums.square > 0 ? sums.along / sums.square : 0;
  }
  ASKEW_FN void take_all(Sequence trials, const Sums* sums) {
    if (trials.least_squares) return take_least_squares(sums[0]);
    double units[most_trials], errors[most_trials];  // all of them first: divisions side by side
    trials.write(units);
    for (int trial = 0; trial < trials.count; ++trial) errors[trial] = left(units[trial], sums[trial]);
    for (int trial = 0; trial < trials.count; ++trial) take(units[trial], sums[trial], errors[trial]);
  }

  // In weight units per level unit. Where all weights are of the sign that the levels don't have, the smaller the scale
  // the better, and none is the best. What such a row needs is room to train, so it gets a scale of the size of its
  // weights.
  ASKEW_FN double scale() const { return (best > 0 ? best : largest / outermost) / fit.per_unit; }
};

}  // namespace askew
