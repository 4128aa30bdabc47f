// Vectors of the instruction set that the including source is compiled for, on the compiler's vector extensions.
//
// Included inside namespace megatron_llm::MEGATRON_LLM_VARIANT, after the pragma that chooses the instruction set, and so
// without includes of its own. Everything is always inlined: code of one instruction set must not be called from another.

#define INLINE static inline __attribute__((always_inline))

constexpr int kLanes = MEGATRON_LLM_LANES;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));
typedef float HalfFloats __attribute__((vector_size(kLanes * 2)));
typedef double Doubles __attribute__((vector_size(kLanes * 4)));  // kLanes / 2 of them

template <typename To, typename From>
INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(result));
  return result;
}

INLINE Floats all(float value) { return value - Floats{}; }

// a * b + c, in one rounding where the instruction set has it.
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if MEGATRON_LLM_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif MEGATRON_LLM_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
#if MEGATRON_LLM_LANES == 16
  return _mm512_fmadd_pd(a, b, c);
#elif MEGATRON_LLM_LANES == 8
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

INLINE Floats square_root(Floats x) {
#if MEGATRON_LLM_LANES == 16
  return _mm512_sqrt_ps(x);
#elif MEGATRON_LLM_LANES == 8
  return _mm256_sqrt_ps(x);
#else
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

// 1 / x of normal x whose inverse is normal, within 1 unit in the last place; of an x whose inverse is not, 0 or that inverse.
INLINE Floats inverse(Floats x) {
#if MEGATRON_LLM_LANES == 16
  const Floats near = _mm512_rcp14_ps(x);
  return multiply_add(near, multiply_add(-x, near, all(1.0f)), near);
#else
  return 1.0f / x;
#endif
}

INLINE float sum_of(Floats x) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof(x));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

INLINE float largest_of(Floats x) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof(x));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] = lanes[lane] > lanes[lane + width] ? lanes[lane] : lanes[lane + width];
  return lanes[0];
}

// e^x within 2 units in the last place between -87 and 88. Below, 0 (results are not subnormal); above, e^88; NaN stays.
//
// x = n ln 2 + r with |r| <= ln(2) / 2, so e^x = 2^n e^r; e^r is 1 + r + r^2 q(r), where q interpolates at Chebyshev points
// (relative error 1e-8).
INLINE Floats exponential(Floats x) {
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  const Floats low = all(-87.0f), high = all(88.0f);
  Floats clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  const Floats shifted = multiply_add(clamped, all(1.44269504089f), magic);
  const Floats n = shifted - magic;
  Floats r = multiply_add(n, all(-0.693359375f), clamped);
  r = multiply_add(n, all(0.000212194440055f), r);
  Floats q = multiply_add(all(0.001392617612f), r, all(0.008363173075f));
  q = multiply_add(q, r, all(0.04166655466f));
  q = multiply_add(q, r, all(0.1666657703f));
  q = multiply_add(q, r, all(0.5f));
  const Floats power = multiply_add(q, r * r, r) + 1.0f;
  const Floats scale = bits_as<Floats>((bits_as<Ints>(shifted) - bits_as<Ints>(magic) + 127) << 23);
  const Floats result = power * scale;
  return x < low ? Floats{} : result;
}

// How elements of each type are loaded as fp32 and stored, rounded to nearest even.
struct Float32 {
  using Stored = float;
  INLINE float load(const float* from) { return *from; }
  INLINE Floats load_vector(const float* from) {
    Floats result;
    __builtin_memcpy(&result, from, sizeof(result));
    return result;
  }
  INLINE void store_vector(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof(value)); }
};

INLINE Shorts load_shorts(const uint16_t* from) {
  Shorts result;
  __builtin_memcpy(&result, from, sizeof(result));
  return result;
}

// Rounds as torch does, subnormal numbers too: for weights, whose copies in 16 bits come from both.
struct ExactBFloat16 {
  using Stored = uint16_t;
  INLINE Floats load_vector(const uint16_t* from) {
    return bits_as<Floats>(__builtin_convertvector(load_shorts(from), Words) << 16);
  }
  INLINE float load(const uint16_t* from) { return bits_as<float>(static_cast<uint32_t>(*from) << 16); }
  INLINE void store_vector(uint16_t* to, Floats value) {
    const Words bits = bits_as<Words>(value);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words nan = Words{} + 0x7fc0;
    const Shorts stored = __builtin_convertvector(value == value ? rounded : nan, Shorts);
    __builtin_memcpy(to, &stored, sizeof(stored));
  }
};

// Rounds in one instruction where there is one, which makes numbers below 1.2e-38, fp32's smallest normal one, zero.
struct BFloat16 : ExactBFloat16 {
#ifdef MEGATRON_LLM_BF16_PRODUCTS
  INLINE void store_vector(uint16_t* to, Floats value) {
    const __m256bh stored = _mm512_cvtneps_pbh(value);
    __builtin_memcpy(to, &stored, sizeof(stored));
  }
#endif
};

INLINE Floats widen_halves(Shorts halves) {
#if MEGATRON_LLM_LANES == 16
  return _mm512_cvtph_ps(bits_as<__m256i>(halves));
#elif MEGATRON_LLM_LANES == 8
  return _mm256_cvtph_ps(bits_as<__m128i>(halves));
#else
  const Words wide = __builtin_convertvector(halves, Words);
  // Exponent and mantissa moved to fp32's places; multiplying repairs the exponent and makes subnormals normal.
  const Floats scaled = bits_as<Floats>((wide & 0x7fff) << 13) * bits_as<float>(0x77800000u);
  const Words special = bits_as<Words>((wide & 0x7c00) == 0x7c00) & 0x7f800000;
  return bits_as<Floats>(bits_as<Words>(scaled) | special | ((wide & 0x8000) << 16));
#endif
}

INLINE Shorts narrow_to_halves(Floats value) {
#if MEGATRON_LLM_LANES == 16
  return bits_as<Shorts>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif MEGATRON_LLM_LANES == 8
  return bits_as<Shorts>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Words sign = bits_as<Words>(value) & 0x80000000;
  const Words bits = bits_as<Words>(value) ^ sign;
  // Subnormal results: adding 0.5 lets the addition itself round at the last place of a half.
  const Words small = bits_as<Words>(bits_as<Floats>(bits) + 0.5f) - bits_as<uint32_t>(0.5f);
  const Words normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const Words special = Words{} + 0x7c00 + (bits_as<Words>(bits > 0x7f800000) & 0x200);
  Words half = bits < (113u << 23) ? small : normal;
  half = bits >= (143u << 23) ? special : half;
  return __builtin_convertvector(half | (sign >> 16), Shorts);
#endif
}

struct Float16 {
  using Stored = uint16_t;
  INLINE Floats load_vector(const uint16_t* from) { return widen_halves(load_shorts(from)); }
  INLINE float load(const uint16_t* from) { return widen_halves(Shorts{*from})[0]; }
  INLINE void store_vector(uint16_t* to, Floats value) {
    const Shorts stored = narrow_to_halves(value);
    __builtin_memcpy(to, &stored, sizeof(stored));
  }
};

INLINE Ints lane_numbers() {
  Ints result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = lane;
  return result;
}

// For a shuffle of two vectors: their lanes from `start` on in turn.
INLINE Ints interleave_mask(int start) {
  Ints mask{};
  for (int lane = 0; lane < kLanes; ++lane) mask[lane] = start + lane / 2 + (lane % 2) * kLanes;
  return mask;
}

// For a shuffle of two vectors: every other lane of both, from `start` on.
INLINE Ints alternate_mask(int start) {
  Ints mask{};
  for (int lane = 0; lane < kLanes; ++lane) mask[lane] = start + lane * 2;
  return mask;
}

// The first `count` < kLanes elements; the other lanes are `rest`. The arithmetic on them is the whole vectors'.
template <typename Type>
INLINE Floats load_part(const typename Type::Stored* from, int64_t count, float rest) {
  typename Type::Stored lanes[kLanes] = {};
  __builtin_memcpy(lanes, from, count * sizeof(*from));
  const Ints places = lane_numbers();
  return places < static_cast<int32_t>(count) ? Type::load_vector(lanes) : all(rest);
}

template <typename Type>
INLINE void store_part(typename Type::Stored* to, int64_t count, Floats value) {
  typename Type::Stored lanes[kLanes];
  Type::store_vector(lanes, value);
  __builtin_memcpy(to, lanes, count * sizeof(*to));
}
