// The reductions themselves, compiled once for each instruction set: no include guard, and the including file names the
// namespace in SHM_VARIANT. Plain loops that the compiler vectorises; nothing here may include a header, whose inline
// functions would then be compiled for a processor that the machine may not have.
namespace shm::SHM_VARIANT {
namespace {

constexpr size_t kBlock = 1024;  // elements that are accumulated at a time, in the first-level cache

struct BFloat16 {
  using Stored = uint16_t;
  using Sum = float;
  static Sum load(Stored bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
  static Stored store(Sum value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    return static_cast<Stored>((bits & 0x7fffffffU) > 0x7f800000U ? 0x7fc0U : rounded);
  }
};

// Conversions of binary16 by integer and float arithmetic alone, after the format's definition (IEEE 754-2008, 3.6).
struct Half {
  using Stored = uint16_t;
  using Sum = float;
  static Sum load(Stored half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
    const uint32_t rest = static_cast<uint32_t>(half & 0x7fffU) << 13;
    // Moving the exponent's bias by a multiplication also normalises subnormal numbers.
    const float scaled = __builtin_bit_cast(float, rest) * 0x1p112f;
    const uint32_t bits = __builtin_bit_cast(uint32_t, scaled) | ((half & 0x7c00U) == 0x7c00U ? 0x7f800000U : 0U);
    return __builtin_bit_cast(float, sign | bits);
  }
  static Stored store(Sum value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t sign = (bits >> 16) & 0x8000U;
    const uint32_t size = bits & 0x7fffffffU;
    // Adding 0.5 puts the units of a subnormal half (2^-24) at the end of the fraction, so that the addition rounds.
    const uint32_t small = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, size) + 0.5f) - 0x3f000000U;
    const uint32_t normal = (size - 0x38000000U + 0xfffU + ((size >> 13) & 1U)) >> 13;
    uint32_t half = size < 0x38800000U ? small : normal;
    half = size >= 0x477ff000U ? 0x7c00U : half;  // half way to the first number too large becomes infinity
    half = size > 0x7f800000U ? 0x7e00U : half;
    return static_cast<Stored>(sign | half);
  }
};

template <class T>
struct Plain {
  using Stored = T;
  using Sum = T;
  static Sum load(Stored value) { return value; }
  static Stored store(Sum value) { return value; }
};

// Truth values: a sum is "any", a product is "all". Stored as 0 or 1 whatever was read.
struct Bool {
  using Stored = uint8_t;
  using Sum = uint8_t;
  static Sum load(Stored value) { return value != 0; }
  static Stored store(Sum value) { return value != 0; }
};

// Unsigned for whole numbers: adding and multiplying then wrap around, as in torch.
template <class T>
struct WrapOf { using Type = T; };
template <>
struct WrapOf<int8_t> { using Type = uint8_t; };
template <>
struct WrapOf<int16_t> { using Type = uint32_t; };
template <>
struct WrapOf<int32_t> { using Type = uint32_t; };
template <>
struct WrapOf<int64_t> { using Type = uint64_t; };

struct Add {
  template <class T>
  static T of(T a, T b) { using W = typename WrapOf<T>::Type; return static_cast<T>(static_cast<W>(a) + static_cast<W>(b)); }
};
struct Multiply {
  template <class T>
  static T of(T a, T b) { using W = typename WrapOf<T>::Type; return static_cast<T>(static_cast<W>(a) * static_cast<W>(b)); }
};
struct Smaller {
  template <class T>
  static T of(T a, T b) { return (a < b) | (a != a) ? a : b; }
};
struct Larger {
  template <class T>
  static T of(T a, T b) { return (a > b) | (a != a) ? a : b; }
};
struct And {
  template <class T>
  static T of(T a, T b) { return static_cast<T>(a & b); }
};
struct Or {
  template <class T>
  static T of(T a, T b) { return static_cast<T>(a | b); }
};
struct Xor {
  template <class T>
  static T of(T a, T b) { return static_cast<T>(a ^ b); }
};

template <class Format, class Combine>
void run(const void* const* sources, int count, size_t elements, void* out, void* copy, bool average) {
  using Stored = typename Format::Stored;
  using Sum = typename Format::Sum;
  alignas(64) Sum total[kBlock];
  alignas(64) Stored result[kBlock];
  for (size_t begin = 0; begin < elements; begin += kBlock) {
    const size_t n = elements - begin < kBlock ? elements - begin : kBlock;
    const Stored* first = static_cast<const Stored*>(sources[0]) + begin;
    if (count == 1) {
      for (size_t i = 0; i < n; i++) total[i] = Format::load(first[i]);
    } else {
      const Stored* second = static_cast<const Stored*>(sources[1]) + begin;
      for (size_t i = 0; i < n; i++) total[i] = Combine::of(Format::load(first[i]), Format::load(second[i]));
    }
    for (int r = 2; r < count; r++) {
      const Stored* next = static_cast<const Stored*>(sources[r]) + begin;
      for (size_t i = 0; i < n; i++) total[i] = Combine::of(total[i], Format::load(next[i]));
    }
    if (average) {
      for (size_t i = 0; i < n; i++) total[i] = static_cast<Sum>(total[i] / static_cast<Sum>(count));
    }
    for (size_t i = 0; i < n; i++) result[i] = Format::store(total[i]);
    __builtin_memcpy(static_cast<Stored*>(out) + begin, result, n * sizeof(Stored));
    if (copy != nullptr) __builtin_memcpy(static_cast<Stored*>(copy) + begin, result, n * sizeof(Stored));
  }
}

template <class Format>
void arithmetic(Op op, const void* const* sources, int count, size_t elements, void* out, void* copy) {
  switch (op) {
    case Op::kProduct: return run<Format, Multiply>(sources, count, elements, out, copy, false);
    case Op::kMin: return run<Format, Smaller>(sources, count, elements, out, copy, false);
    case Op::kMax: return run<Format, Larger>(sources, count, elements, out, copy, false);
    default: return run<Format, Add>(sources, count, elements, out, copy, op == Op::kAverage);
  }
}

template <class Format>
void whole(Op op, const void* const* sources, int count, size_t elements, void* out, void* copy) {
  switch (op) {
    case Op::kAnd: return run<Format, And>(sources, count, elements, out, copy, false);
    case Op::kOr: return run<Format, Or>(sources, count, elements, out, copy, false);
    case Op::kXor: return run<Format, Xor>(sources, count, elements, out, copy, false);
    default: return arithmetic<Format>(op, sources, count, elements, out, copy);
  }
}

Op of_truth(Op op) {
  switch (op) {
    case Op::kSum: case Op::kMax: return Op::kOr;
    case Op::kProduct: case Op::kMin: return Op::kAnd;
    default: return op;
  }
}

}  // namespace

void reduce(Type type, Op op, const void* const* sources, int count, size_t elements, void* out, void* copy) {
  switch (type) {
    case Type::kFloat: return arithmetic<Plain<float>>(op, sources, count, elements, out, copy);
    case Type::kDouble: return arithmetic<Plain<double>>(op, sources, count, elements, out, copy);
    case Type::kHalf: return arithmetic<Half>(op, sources, count, elements, out, copy);
    case Type::kBFloat16: return arithmetic<BFloat16>(op, sources, count, elements, out, copy);
    case Type::kInt8: return whole<Plain<int8_t>>(op, sources, count, elements, out, copy);
    case Type::kUInt8: return whole<Plain<uint8_t>>(op, sources, count, elements, out, copy);
    case Type::kInt16: return whole<Plain<int16_t>>(op, sources, count, elements, out, copy);
    case Type::kInt32: return whole<Plain<int32_t>>(op, sources, count, elements, out, copy);
    case Type::kInt64: return whole<Plain<int64_t>>(op, sources, count, elements, out, copy);
    case Type::kBool: return whole<Bool>(of_truth(op), sources, count, elements, out, copy);
  }
}

}  // namespace shm::SHM_VARIANT
