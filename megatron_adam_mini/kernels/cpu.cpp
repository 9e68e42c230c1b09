// CPU kernels of Adam-mini behind a C interface, without torch or Python headers.
//
// The loops are in cpu_kernels.inc, which is compiled once per instruction set; the functions below
// pick the best that the processor has. Signatures and meaning: reference.py. The caller (cpu.py)
// has checked sizes and the dtypes of slices; vectors have those of reference.py.
//
// Compiled with -ffp-contract=off: the instruction sets then give the same bits.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// One tile, see cpu_tiles.py.
struct Tile {
  int64_t start, length, count, index, packed, within, partial, shift;
};

// One rectangle of a run of rows, and the partial sums of some segments, see column_tiles.py.
struct Rectangle {
  int64_t start, stride, columns, lines, partial, index, width, position, shift, row_stride;
};
struct ColumnSums {
  int64_t index, segments, partial, end, width;
};

// Storage of one buffer and of this rank's state of it, see arguments.py. Kinds: 0 float32,
// 1 bfloat16, 2 float16, 3 int16 remainders, 4 uint8 (of m: codes), -1 none.
struct Buffer {
  void* param;
  void* exp_avg;
  void* weight;
  const void* grad;
  int32_t param_kind, exp_avg_kind, weight_kind, grad_kind;
  const int32_t* origin;  // null: round m to the nearest
};

// The numbers of one step, see StepScalars.
struct Scalars {
  const float* grad_scale;
  const float* bias_corrections;
  const float* hyper;  // lr, eps, decay per group
  const int64_t* noise_key;
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
};

// Vectors with one entry per segment.
struct Segments {
  float* exp_avg_sq;
  float* step_size;
  float* sum_sq;
  const float* inv_numel;
  const int32_t* group;
  float* exp_avg_scale;  // of codes of m, before and after the step; null: m has other storage
};

inline bool is_finite(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits & 0x7f800000u) != 0x7f800000u;
}

}  // namespace

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

namespace baseline {
#include "cpu_kernels.inc"
}

// Before GCC 11 the names of x86-64 levels are not known; then, as with clang, the baseline serves.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define ADAM_MINI_DISPATCH 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#include "cpu_kernels.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace avx512 {
#include "cpu_kernels.inc"
}
#pragma GCC pop_options
#endif

namespace {

// 0 baseline, 1 AVX2 (x86-64-v3), 2 AVX-512 (x86-64-v4).
int best_level() {
#ifdef ADAM_MINI_DISPATCH
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    return 1;
#endif
  return 0;
}

int level = best_level();

}  // namespace

#ifdef ADAM_MINI_DISPATCH
#define DISPATCH(call)       \
  switch (level) {           \
    case 2: avx512::call; break; \
    case 1: avx2::call; break;   \
    default: baseline::call;     \
  }
#else
#define DISPATCH(call) baseline::call
#endif

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Changes with every signature and rounding, so that a stale library is noticed.
EXPORT int adam_mini_abi() { return 7; }

EXPORT int adam_mini_level() { return level; }

// For tests: use at most this level.
EXPORT void adam_mini_limit_level(int most) {
  int best = best_level();
  level = most < best ? most : best;
}

EXPORT int adam_mini_has_threads() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

EXPORT void adam_mini_segment_sum_sq(float* sum_sq, const void* grad, int grad_kind,
                                     const Tile* tiles, int64_t num_tiles, double* partials,
                                     int threads) {
  DISPATCH(segment_sum_sq(sum_sq, grad, grad_kind, tiles, num_tiles, partials, threads));
}

EXPORT void adam_mini_column_sum_sq(float* sum_sq, const void* grad, int grad_kind,
                                    const Rectangle* rectangles, int64_t num_rectangles,
                                    const ColumnSums* sums, int64_t num_sums, double* partials,
                                    int threads) {
  DISPATCH(column_sum_sq(sum_sq, grad, grad_kind, rectangles, num_rectangles, sums, num_sums,
                         partials, threads));
}

EXPORT void adam_mini_ordered_sum(float* values, const int32_t* target, const int32_t* bounds,
                                  const int32_t* source, int64_t rows, int threads) {
  DISPATCH(ordered_sum(values, target, bounds, source, rows, threads));
}

EXPORT void adam_mini_norm_partials(double* stats, int64_t domains, const float* sum_sq,
                                    const int8_t* domain, int64_t numel) {
  DISPATCH(norm_partials(stats, domains, sum_sq, domain, numel));
}

EXPORT void adam_mini_segment_step_size(const Segments* segments, const Scalars* scalars,
                                        const int64_t* index, int64_t numel, int threads) {
  if (!is_finite(*scalars->grad_scale)) return;
  DISPATCH(segment_step_size(*segments, *scalars, index, numel, threads));
}

EXPORT void adam_mini_update(const Buffer* buffer, const Tile* tiles, int64_t num_tiles,
                             const Segments* segments, const Scalars* scalars, int threads) {
  if (!is_finite(*scalars->grad_scale)) return;
  DISPATCH(update(*buffer, tiles, num_tiles, *segments, *scalars, threads));
}

EXPORT void adam_mini_update_columns(const Buffer* buffer, const Rectangle* rectangles,
                                     int64_t num_rectangles, const Segments* segments,
                                     const Scalars* scalars, int threads) {
  if (!is_finite(*scalars->grad_scale)) return;
  DISPATCH(update_columns(*buffer, rectangles, num_rectangles, *segments, *scalars, threads));
}

EXPORT void adam_mini_update_in_one_pass(const Buffer* buffer, const Tile* tiles, int64_t num_tiles,
                                         const Segments* segments, const Scalars* scalars,
                                         int threads) {
  if (!is_finite(*scalars->grad_scale)) return;
  DISPATCH(update_in_one_pass(*buffer, tiles, num_tiles, *segments, *scalars, threads));
}

EXPORT void adam_mini_update_elementwise(const Buffer* buffer, float* exp_avg_sq, const Tile* tiles,
                                         int64_t num_tiles, const int32_t* group,
                                         const Scalars* scalars, int threads) {
  if (!is_finite(*scalars->grad_scale)) return;
  DISPATCH(update_elementwise(*buffer, exp_avg_sq, tiles, num_tiles, group, *scalars, threads));
}

}  // extern "C"
