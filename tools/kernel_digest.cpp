// Prints one line of digests per combination of storage, after all C++ kernels have run on numbers
// that follow from integers alone: equal lines on two processors mean equal bits. See
// check_aarch64.sh.

#include <cstdio>
#include <vector>

#include "../megatron_adam_mini/kernels/cpu.cpp"

namespace {

uint32_t state = 7;

// In (-1, 1), exact on every processor.
float random_value() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state >> 8) - (1 << 23)) / (1 << 23);
}

uint16_t upper_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

// FNV-1a.
template <class T>
void add_digest(uint64_t* digest, const std::vector<T>& values) {
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i)
    *digest = (*digest ^ bytes[i]) * 1099511628211ull;
}

void print_digest(int grad_kind, int exp_avg_kind, int param_kind, bool stochastic) {
  constexpr int NUMEL = 100000, SEGMENTS = 300;
  std::vector<float> grad(NUMEL), exp_avg(NUMEL), param(NUMEL), exp_avg_sq_E(NUMEL);
  std::vector<uint16_t> grad16(NUMEL), exp_avg16(NUMEL), remainder(NUMEL), weight(NUMEL);
  std::vector<uint8_t> exp_avg8(NUMEL);
  std::vector<float> exp_avg_sq(SEGMENTS), step_size(SEGMENTS), sum_sq(SEGMENTS);
  std::vector<float> scale(2 * SEGMENTS);
  std::vector<float> inv_numel(SEGMENTS);
  std::vector<int32_t> group(SEGMENTS), origin(SEGMENTS);
  std::vector<int8_t> domain(SEGMENTS);
  state = 7;
  for (int i = 0; i < NUMEL; ++i) {
    grad[i] = random_value() / 8;
    exp_avg[i] = random_value() / 64;
    param[i] = random_value();
    exp_avg_sq_E[i] = random_value() * random_value() / 64 + 1.0f / 64;
    // As float16, a pattern that is finite: bfloat16's exponents would not be.
    grad16[i] = grad_kind == 2 ? (state >> 16) & 0xbbffu : upper_half(grad[i]);
    exp_avg16[i] = upper_half(exp_avg[i]);
    exp_avg8[i] = static_cast<uint8_t>((state >> 9) & 0xf7u);  // no NaN
    weight[i] = upper_half(param[i]);
    remainder[i] = static_cast<uint16_t>(state >> 12);
  }
  for (int i = 0; i < SEGMENTS; ++i) {
    exp_avg_sq[i] = random_value() / 64 + 1.0f / 32;
    inv_numel[i] = 1.0f / 128;
    group[i] = i % 2;
    domain[i] = static_cast<int8_t>(i % 3 - 1);
    origin[i] = i * 12345 - 99999;
  }
  const float hyper[6] = {1e-3f, 1e-8f, 0.999f, 2e-3f, 1e-7f, 0.998f};
  const float grad_scale = 0.5f, bias_corrections[2] = {0.271f, 0.142625f};
  const int64_t noise_key = 3000000000ll;
  const Buffer buffer = {
      param_kind ? static_cast<void*>(remainder.data()) : param.data(),
      exp_avg_kind == 4   ? static_cast<void*>(exp_avg8.data())
      : exp_avg_kind == 1 ? static_cast<void*>(exp_avg16.data())
                          : exp_avg.data(),
      weight.data(),
      grad_kind ? static_cast<const void*>(grad16.data()) : grad.data(),
      param_kind, exp_avg_kind, 1, grad_kind, stochastic ? origin.data() : nullptr};
  const Scalars scalars = {&grad_scale, bias_corrections, hyper, &noise_key,
                           0.9f,        0.1f,             0.95f, 0.05f};
  const Segments segments = {exp_avg_sq.data(), step_size.data(), sum_sq.data(), inv_numel.data(),
                             group.data(), exp_avg_kind == 4 ? scale.data() : nullptr};
  // Odd and even numbers of rows, with and without tails, and one long row; state where the
  // buffer's elements are, before and behind.
  const std::vector<Tile> tiles = {{0, 100, 101, 0, 0, 0, -1, 0},
                                   {10100, 64, 40, 101, 10100, 0, -1, 32},
                                   {13000, 5, 99, 150, 12660, 0, -1, -101},
                                   {20000, 40000, 1, 260, 13155, 0, -1, 1016}};
  const int64_t num = static_cast<int64_t>(tiles.size());
  double partials[1] = {}, stats[4] = {};
  adam_mini_segment_sum_sq(sum_sq.data(), buffer.grad, grad_kind, tiles.data(), num, partials, 1);
  adam_mini_norm_partials(stats, 2, sum_sq.data(), domain.data(), SEGMENTS);
  adam_mini_segment_step_size(&segments, &scalars, nullptr, SEGMENTS, 1);
  adam_mini_update(&buffer, tiles.data(), num, &segments, &scalars, 1);
  adam_mini_update_in_one_pass(&buffer, tiles.data(), num, &segments, &scalars, 1);
  adam_mini_update_elementwise(&buffer, exp_avg_sq_E.data(), tiles.data(), num, group.data(),
                               &scalars, 1);
  uint64_t digest = 14695981039346656037ull;
  for (const auto* vector :
       {&exp_avg, &param, &exp_avg_sq_E, &exp_avg_sq, &step_size, &sum_sq, &scale})
    add_digest(&digest, *vector);
  add_digest(&digest, exp_avg8);
  for (const auto* vector : {&exp_avg16, &remainder, &weight}) add_digest(&digest, *vector);
  std::printf("grad %d exp_avg %d param %d stochastic %d: %016llx norm %a %a\n", grad_kind,
              exp_avg_kind, param_kind, stochastic, static_cast<unsigned long long>(digest),
              stats[0], stats[2]);
}

}  // namespace

int main() {
  for (int grad_kind : {0, 1, 2})
    for (int param_kind : {0, 3}) {
      print_digest(grad_kind, 0, param_kind, false);
      print_digest(grad_kind, 1, param_kind, false);
      print_digest(grad_kind, 1, param_kind, true);
      print_digest(grad_kind, 4, param_kind, true);
    }
}
