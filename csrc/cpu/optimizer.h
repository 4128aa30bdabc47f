// What works on flat buffers: AdamW, accumulation of gradients. Part of a variant; see vectors.h.

struct AdamWState {
  Floats main, exp_avg, exp_avg_sq;
};

// AdamW (Loshchilov and Hutter 2019) in the order of operations, and with the fused roundings, of torch.optim.AdamW(fused=True)
// on processors that have them, so that results are the same to the last bit.
INLINE AdamWState update_adamw(const AdamW& work, AdamWState state, Floats grad) {
  grad *= work.grad_scale;
  const Floats difference = grad - state.exp_avg;
  const bool from_average = work.average_step < 0.5f;  // linear interpolation starts at the nearer end
  state.exp_avg = multiply_add(
      all(from_average ? work.average_step : work.average_step - 1.0f), difference, from_average ? state.exp_avg : grad);
  state.exp_avg_sq = multiply_add(work.square_step * grad, grad, state.exp_avg_sq * work.beta2);
  const Floats denominator = square_root(state.exp_avg_sq) / work.root_correction + work.epsilon;
  state.main = state.main * work.decay - work.step_size * state.exp_avg / denominator;
  return state;
}

// `Rounded` is Float32 where no rounded copy is wanted.
template <typename Grad, typename Rounded>
static void adamw(const AdamW& work, int64_t begin, int64_t end) {
  constexpr bool round = sizeof(typename Rounded::Stored) == 2;
  const auto* grad = static_cast<const typename Grad::Stored*>(work.grad);
  auto* rounded = static_cast<typename Rounded::Stored*>(work.rounded);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    AdamWState state{
        Float32::load_vector(work.main + i), Float32::load_vector(work.exp_avg + i), Float32::load_vector(work.exp_avg_sq + i)};
    state = update_adamw(work, state, Grad::load_vector(grad + i));
    Float32::store_vector(work.main + i, state.main);
    Float32::store_vector(work.exp_avg + i, state.exp_avg);
    Float32::store_vector(work.exp_avg_sq + i, state.exp_avg_sq);
    if (round) Rounded::store_vector(rounded + i, state.main);
  }
  if (const int64_t left = end - i; left > 0) {
    AdamWState state{
        load_part<Float32>(work.main + i, left, 0.0f),
        load_part<Float32>(work.exp_avg + i, left, 0.0f),
        load_part<Float32>(work.exp_avg_sq + i, left, 0.0f)};
    state = update_adamw(work, state, load_part<Grad>(grad + i, left, 0.0f));
    store_part<Float32>(work.main + i, left, state.main);
    store_part<Float32>(work.exp_avg + i, left, state.exp_avg);
    store_part<Float32>(work.exp_avg_sq + i, left, state.exp_avg_sq);
    if (round) store_part<Rounded>(rounded + i, left, state.main);
  }
}

template <typename Type>
static void accumulate(float* total, const void* addend, int64_t count) {
  const auto* from = static_cast<const typename Type::Stored*>(addend);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    Float32::store_vector(total + i, Float32::load_vector(total + i) + Type::load_vector(from + i));
  if (const int64_t left = count - i; left > 0)
    store_part<Float32>(total + i, left, load_part<Float32>(total + i, left, 0.0f) + load_part<Type>(from + i, left, 0.0f));
}
