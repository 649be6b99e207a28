// A weight matrix as linear layers read it, and how it gets there from a checkpoint.
//
// y = W x with W [outputs, inputs]. Outputs are cut into panels of kPanel, the last one filled up
// with zeros; a panel is [inputs][kPanel], so that a product streams through memory from one end
// to the other, whatever it is for:
//
//     float32   kPanel floats
//     bfloat16  kWidth words of 32 bits; the lower half of word i is output i, the upper half is
//               output i + kWidth: a shift or a mask makes a vector of floats of them, exactly
//     pairs     for products in bfloat16: kPanel words for two inputs; the lower half of word i is
//               output i of the first, the upper half of the second. Inputs are filled up with
//               zeros to whole groups (bfloat16.h)
#pragma once

#include "attention_tile.h"
#include "bfloat16.h"

namespace baton {

constexpr int kPanel = 2 * kWidth;

// What a value of a packed matrix is. Formats with scales will need more than this.
enum class Format : int32_t { kFloat32, kBfloat16, kPairs };

struct Matrix {
  const void* panels;
  int64_t inputs, outputs;
  Format format;
};

// Two vectors of a panel's row.
struct Pair {
  Vec low, high;
};

struct Float32 {
  using Value = float;
  static Pair load_row(const float* row) { return {load(row), load(row + kWidth)}; }
  static int64_t rows(int64_t inputs) { return inputs; }
  static int64_t place(int64_t input, int output) { return input * kPanel + output; }
};

struct Bfloat16 {
  using Value = uint16_t;
  static Pair load_row(const uint16_t* row) {
    const IntVec words = load_words(row);
    return {first_of(words), second_of(words)};
  }
  static int64_t rows(int64_t inputs) { return inputs; }
  static int64_t place(int64_t input, int output) {
    return input * kPanel + (output < kWidth ? 2 * output : 2 * (output - kWidth) + 1);
  }
};

struct Pairs {
  using Value = uint16_t;
  static int64_t rows(int64_t inputs) { return whole_groups(inputs) * kGroup; }
  static int64_t place(int64_t input, int output) {
    return (input / 2 * kPanel + output) * 2 + input % 2;
  }
};

// Bytes of a packed matrix.
static inline int64_t packed_bytes(int64_t inputs, int64_t outputs, Format format) {
  const int64_t whole = (outputs + kPanel - 1) / kPanel * kPanel;
  if (format == Format::kPairs) return whole * Pairs::rows(inputs) * 2;
  return whole * inputs * (format == Format::kBfloat16 ? 2 : 4);
}

// A tensor as it lies in a checkpoint's file; strides are in values.
enum class Stored : int32_t { kFloat32, kBfloat16, kFloat16 };

struct Source {
  const void* data;
  int64_t rows, row_stride, column_stride;
  Stored stored;
};

static inline float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  uint32_t word = static_cast<uint32_t>(bits & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &word, sizeof value);
  if (word >= 0x0f800000u) {  // infinity and NaN
    word |= 0x7f800000u;
    std::memcpy(&value, &word, sizeof value);
  } else {
    value *= 5.192296858534828e33f;  // 2^112, exact for subnormal numbers too
  }
  std::memcpy(&word, &value, sizeof word);
  word |= sign;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

static inline float stored_value(const Source& source, int64_t index) {
  switch (source.stored) {
    case Stored::kFloat32:
      return static_cast<const float*>(source.data)[index];
    case Stored::kBfloat16:
      return to_float(static_cast<const Bf16*>(source.data)[index]);
    case Stored::kFloat16:
      return from_float16(static_cast<const uint16_t*>(source.data)[index]);
  }
  return 0;
}

// Moves a tile of at most kPanel outputs, which begin at `output` of one panel.
template <class Weights, class Read>
static void pack_tile(typename Weights::Value* panel, int output, int count, int64_t begin,
                      int64_t end, Read read) {
  for (int row = 0; row < count; ++row) {
    for (int64_t k = begin; k < end; ++k) panel[Weights::place(k, output + row)] = read(row, k);
  }
}

constexpr int64_t kTile = 64;  // Inputs that are packed at a time.

// As pack_tile, of rows that lie side by side in memory, kPanel of them and kTile inputs.
static inline void pack_whole_tile(Bfloat16, const uint16_t* rows, int64_t step, uint16_t* panel) {
  uint32_t words[kWidth][kTile];
  const float* starts[kWidth];
  for (int row = 0; row < kWidth; ++row) {
    const uint16_t *low = rows + row * step, *high = rows + (row + kWidth) * step;
    for (int k = 0; k < kTile; ++k) words[row][k] = low[k] | static_cast<uint32_t>(high[k]) << 16;
    starts[row] = reinterpret_cast<const float*>(words[row]);
  }
  pack_keys(starts, kTile, reinterpret_cast<float*>(panel));
}

// `count` words of 4 bytes of each row.
static inline void pack_words(const void* rows, int64_t step_bytes, int count, void* panel) {
  float half[kTile * kWidth];
  const float* starts[kWidth];
  float* to = static_cast<float*>(panel);
  for (int first = 0; first < kPanel; first += kWidth) {
    for (int row = 0; row < kWidth; ++row) {
      const char* start = static_cast<const char*>(rows) + (first + row) * step_bytes;
      starts[row] = reinterpret_cast<const float*>(start);
    }
    pack_keys(starts, count, half);
    for (int k = 0; k < count; ++k) store(to + k * kPanel + first, load(half + k * kWidth));
  }
}

static inline void pack_whole_tile(Float32, const float* rows, int64_t step, float* panel) {
  pack_words(rows, step * 4, kTile, panel);
}

static inline void pack_whole_tile(Pairs, const uint16_t* rows, int64_t step, uint16_t* panel) {
  pack_words(rows, step * 2, kTile / 2, panel);
}

// Packs the source's rows as outputs [first, first + rows) of panels that hold zeros so far.
//
// `whole` are the source's values where they are of the matrix's type and lie side by side, or null.
template <class Weights, class Read>
static void pack_rows(const Matrix& matrix, int64_t first, const Source& source, Share share,
                      const typename Weights::Value* whole, Read read) {
  const int64_t inputs = matrix.inputs, last = first + source.rows;
  auto* panels = static_cast<typename Weights::Value*>(const_cast<void*>(matrix.panels));
  for (int64_t p = share.begin; p < share.end; ++p) {
    auto* panel = panels + p * Weights::rows(inputs) * kPanel;
    const int64_t begin = p * kPanel, from = begin < first ? first : begin;
    const int64_t to = begin + kPanel < last ? begin + kPanel : last;
    for (int64_t k = 0; k < inputs; k += kTile) {
      if (whole && to - from == kPanel && k + kTile <= inputs) {
        const auto* rows = whole + (from - first) * source.row_stride + k;
        pack_whole_tile(Weights(), rows, source.row_stride, panel + k * kPanel);
        continue;
      }
      pack_tile<Weights>(panel, static_cast<int>(from - begin), static_cast<int>(to - from), k,
                         k + kTile < inputs ? k + kTile : inputs,
                         [&](int row, int64_t column) { return read(from - first + row, column); });
    }
  }
}

// Float16 becomes float32: there is no exact and cheaper way to hold it.
static inline void pack(const Matrix& matrix, int64_t first, const Source& source, int thread,
                        int threads) {
  const int64_t step = source.row_stride, hop = source.column_stride;
  const int64_t begin = first / kPanel, end = (first + source.rows + kPanel - 1) / kPanel;
  Share share = share_of(end - begin, thread, threads);
  share = {begin + share.begin, begin + share.end};
  if (matrix.format == Format::kBfloat16) {
    const auto* values = static_cast<const uint16_t*>(source.data);
    pack_rows<Bfloat16>(matrix, first, source, share, hop == 1 ? values : nullptr,
                        [=](int64_t row, int64_t k) { return values[row * step + k * hop]; });
    return;
  }
  if (matrix.format == Format::kPairs) {
    const bool whole = hop == 1 && source.stored == Stored::kBfloat16;
    pack_rows<Pairs>(
        matrix, first, source, share, whole ? static_cast<const uint16_t*>(source.data) : nullptr,
        [&](int64_t row, int64_t k) {
          return narrowed(stored_value(source, row * step + k * hop));
        });
    return;
  }
  const bool whole = hop == 1 && source.stored == Stored::kFloat32;
  pack_rows<Float32>(
      matrix, first, source, share, whole ? static_cast<const float*>(source.data) : nullptr,
      [&](int64_t row, int64_t k) { return stored_value(source, row * step + k * hop); });
}

template <class Weights>
static void unpack_row(const Matrix& matrix, int64_t output, float scale, float* out) {
  const auto* panel = static_cast<const typename Weights::Value*>(matrix.panels) +
                      output / kPanel * Weights::rows(matrix.inputs) * kPanel;
  for (int64_t k = 0; k < matrix.inputs; ++k) {
    const auto value = panel[Weights::place(k, static_cast<int>(output % kPanel))];
    if constexpr (sizeof(value) == 2) {
      out[k] = to_float(Bf16{value}) * scale;
    } else {
      out[k] = value * scale;
    }
  }
}

// A row of W times `scale`: how a tied model's embedding is read from its output matrix.
static inline void matrix_row(const Matrix& matrix, int64_t output, float scale, float* out) {
  if (matrix.format == Format::kBfloat16) return unpack_row<Bfloat16>(matrix, output, scale, out);
  if (matrix.format == Format::kPairs) return unpack_row<Pairs>(matrix, output, scale, out);
  unpack_row<Float32>(matrix, output, scale, out);
}

}  // namespace baton
