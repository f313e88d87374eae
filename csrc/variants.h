// From the values in a launch to the types that the kernels are compiled for.
#pragma once

#include "launch.h"

namespace askew {

enum class Book { none, uniform, table16, table256 };

template <typename Storage_, typename Rule_, typename Annealing_, Book book_>
struct Variant {
  using Storage = Storage_;
  using T = Arithmetic<Storage>;
  using RuleType = Rule_;
  using Annealing = Annealing_;
  static constexpr Book book = book_;
  static constexpr bool is_table = book == Book::table16 || book == Book::table256;
  static constexpr int capacity = book == Book::table16 ? 16 : 256;
};

template <typename Storage, typename RuleType, typename Visitor>
ASKEW_HOST_FN void visit_annealing(const Launch& launch, const Visitor& visit) {
  const Levels levels = launch.levels;
  const auto anneal = [&](auto annealing) {
    using Annealing = decltype(annealing);
    if (is_uniform(levels))
      visit(Variant<Storage, RuleType, Annealing, Book::uniform>{});
    else if (levels.count <= 16)
      visit(Variant<Storage, RuleType, Annealing, Book::table16>{});
    else
      visit(Variant<Storage, RuleType, Annealing, Book::table256>{});
  };
  if (levels.count == 0)
    visit(Variant<Storage, RuleType, Capture, Book::none>{});
  else if (launch.settings.interval)
    anneal(Interval{});
  else
    anneal(Capture{});
}

template <typename Storage, typename Visitor>
ASKEW_HOST_FN void visit_rule(const Launch& launch, const Visitor& visit) {
  switch (launch.rule) {
    case Rule::sgd:
      return visit_annealing<Storage, Sgd>(launch, visit);
    case Rule::adamw:
      return visit_annealing<Storage, AdamW>(launch, visit);
  }
}

// Calls visit(Variant<..>{}) with the one that fits the launch.
template <typename Visitor>
ASKEW_HOST_FN void visit_variant(const Launch& launch, const Visitor& visit) {
  switch (launch.dtype) {
    case Dtype::float32:
      return visit_rule<float>(launch, visit);
    case Dtype::float64:
      return visit_rule<double>(launch, visit);
    case Dtype::bfloat16:
      return visit_rule<BFloat16>(launch, visit);
    case Dtype::float16:
      return visit_rule<Float16>(launch, visit);
  }
}

}  // namespace askew
