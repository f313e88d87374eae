// The table of a captured launch. What a graph replays may not rely on memory of the host: the content travels as the
// arguments of kernels that write the table. Columns that are zero in all rows, as those of what a call does not use,
// stay at home.
#pragma once

#include "cuda.h"

namespace askew {

constexpr int span_words = sizeof(Span) / 8;
constexpr int table_columns = span_words + 1;  // and first_chunk
constexpr int part_words = 4050;               // with the rest below the 32,764 bytes that kernel arguments may have
static_assert(sizeof(Span) % 8 == 0);

// Rows [first, first + rows) of the table; row span_count has a first_chunk only.
struct TablePart {
  const Span* spans;
  const int64_t* first_chunk;
  int64_t span_count, first;
  int32_t rows, columns;
  int8_t place[table_columns];  // of a column among those that travel; -1: it is zero
  uint64_t words[part_words];
};
static_assert(sizeof(TablePart) <= 32764);

ASKEW_HOST_FN void row_of(const Launch& launch, int64_t i, int64_t chunks, uint64_t (&row)[table_columns]) {
  std::memset(row, 0, sizeof row);
  if (i < launch.span_count) std::memcpy(row, &launch.spans[i], sizeof(Span));
  row[span_words] = static_cast<uint64_t>(chunks);
}

// As many rows as travel together, from `first` on; row span_count is the last one.
inline TablePart table_part(const Launch& launch, const CudaCall& call, int64_t first) {
  TablePart part{call.spans, call.first_chunk, launch.span_count, first, 0, 0, {}, {}};
  uint64_t row[table_columns];
  bool used[table_columns] = {};
  int64_t before = 0, chunks = 0;  // before the first row
  for (int64_t i = 0; i <= launch.span_count; ++i) {
    if (i == first) before = chunks;
    row_of(launch, i, chunks, row);
    for (int k = 0; k < table_columns; ++k) used[k] = used[k] || row[k] != 0;
    if (i < launch.span_count) chunks += chunks_of(launch.spans[i].size, call.chunk);
  }
  for (int k = 0; k < table_columns; ++k) part.place[k] = static_cast<int8_t>(used[k] ? part.columns++ : -1);
  chunks = before;
  for (int64_t i = first; i <= launch.span_count && (part.rows + 1) * part.columns <= part_words; ++i, ++part.rows) {
    row_of(launch, i, chunks, row);
    for (int k = 0; k < table_columns; ++k)
      if (used[k]) part.words[part.rows * part.columns + part.place[k]] = row[k];
    if (i < launch.span_count) chunks += chunks_of(launch.spans[i].size, call.chunk);
  }
  return part;
}

// What thread `number` of the kernel writes: one word.
ASKEW_FN void write_entry(const TablePart& part, int64_t number) {
  const int32_t column = static_cast<int32_t>(number % table_columns);
  const int64_t row = number / table_columns, i = part.first + row;
  if (row >= part.rows) return;
  const uint64_t word = part.place[column] < 0 ? 0 : part.words[row * part.columns + part.place[column]];
  if (column == span_words)
    std::memcpy(const_cast<int64_t*>(part.first_chunk) + i, &word, sizeof word);
  else if (i < part.span_count)
    std::memcpy(reinterpret_cast<char*>(const_cast<Span*>(part.spans + i)) + column * sizeof word, &word, sizeof word);
}

}  // namespace askew
