// Packing the operands of matrix products as tiles (AMX), at one level; included by tile_product.h.
namespace vlcore::VLCORE_LEVEL {

// A tile of A is 16 rows of 32 steps of the depth; a tile of B is 16 pairs of steps, each of 16 columns. Either is 16
// vectors of 16 pairs. A strip, of 32 rows or columns, is two tiles wide.
constexpr int64_t kTileSide = 16, kTileDepth = 32, kTileSize = kTileSide * kTileDepth, kStrip = 2 * kTileSide;

// A tile to be packed: where its vectors begin, how far apart they (or the steps that make them) are, and where it
// goes.
struct Tile {
  const bfloat16* from;
  int64_t stride;
  bfloat16* to;
};

// Vector i of a tile: of 32 steps that lie side by side, or of two steps with 16 rows or columns each.
template <bool kOfSteps>
VLCORE_INLINE IntVec read_vector(const Tile& tile, int64_t i) {
  if constexpr (kOfSteps) {
    return (IntVec)_mm512_loadu_si512(tile.from + i * tile.stride);
  } else {
    const auto widened = [&](int64_t step) VLCORE_INLINED {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(tile.from + step * tile.stride)));
    };
    return (IntVec)_mm512_or_si512(widened(2 * i), _mm512_slli_epi32(widened(2 * i + 1), 16));
  }
}

// Pair i of four vectors goes to 16 bytes of the i-th vector from `to` on.
VLCORE_INLINE void store_transposed(const IntVec (&vectors)[4], bfloat16* to) {
  const __m512i a = (__m512i)vectors[0], b = (__m512i)vectors[1], c = (__m512i)vectors[2], d = (__m512i)vectors[3];
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  // Lane l of pairs[i] is pair 4 l + i.
  const __m512i pairs[4] = {_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
                            _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto at = [=](int lane) VLCORE_INLINED { return (__m128i*)(to + (4 * lane + i) * kTileDepth); };
    _mm_storeu_si128(at(0), _mm512_castsi512_si128(pairs[i]));
    _mm_storeu_si128(at(1), _mm512_extracti32x4_epi32(pairs[i], 1));
    _mm_storeu_si128(at(2), _mm512_extracti32x4_epi32(pairs[i], 2));
    _mm_storeu_si128(at(3), _mm512_extracti32x4_epi32(pairs[i], 3));
  }
}

// Four of a tile's 16 vectors: as much as fits beside one step of a product.
template <bool kOfSteps, bool kTransposed>
VLCORE_INLINE void pack_quarter(const Tile& tile, int64_t quarter) {
  IntVec vectors[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) vectors[i] = read_vector<kOfSteps>(tile, 4 * quarter + i);
  if constexpr (kTransposed) return store_transposed(vectors, tile.to + 8 * quarter);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    std::memcpy(static_cast<void*>(tile.to + (4 * quarter + i) * kTileDepth), &vectors[i], sizeof(IntVec));
  }
}

// The tiles of a strip, (depth / 32, 2, 16, 32), in the order in which the operand is read fastest. What lies beyond
// the operand becomes zeros.
class StripTiles {
 public:
  StripTiles() = default;
  // The strip's `count` <= 32 rows of A or columns of B are rows of `from`, and the depth its columns.
  StripTiles(View<bfloat16> from, int64_t count, int64_t depth, bfloat16* to)
      : from_(from), count_(count), depth_(depth), to_(to), steps_(round_up(depth, kTileDepth) / kTileDepth) {
    left_ = 2 * steps_;
  }

  int64_t left() const { return left_; }

  // Not inlined: a product calls it in its inner loop, whose registers are few.
  __attribute__((noinline)) Tile next() {
    const int64_t row = half_ * kTileSide, depth = step_ * kTileDepth;
    Tile tile{from_.at(row, depth), from_.col == 1 ? from_.row : from_.col, to_ + (2 * step_ + half_) * kTileSize};
    if (row + kTileSide > count_ || depth + kTileDepth > depth_) copy_edge(tile, count_ - row, depth_ - depth);
    --left_;
    // Along the rows of the operand.
    if (from_.col == 1) {
      if (++step_ == steps_) step_ = 0, ++half_;
    } else {
      step_ += half_;
      half_ ^= 1;
    }
    return tile;
  }

 private:
  // A tile at the edge, of fewer rows or steps, is read from a copy with zeros behind it.
  void copy_edge(Tile& tile, int64_t rows, int64_t steps) {
    const bool is_of_steps = from_.col == 1;
    const int64_t width = is_of_steps ? kTileDepth : kTileSide;
    const int64_t lines = std::clamp<int64_t>(is_of_steps ? rows : steps, 0, kTileSize / width);
    const int64_t length = std::clamp<int64_t>(is_of_steps ? steps : rows, 0, width);
    std::memset(static_cast<void*>(edge_), 0, sizeof edge_);
    for (int64_t line = 0; line < lines; ++line) {
      std::memcpy(static_cast<void*>(edge_ + line * width), tile.from + line * tile.stride, length * sizeof(bfloat16));
    }
    tile.from = edge_;
    tile.stride = width;
  }

  View<bfloat16> from_ = {};
  int64_t count_ = 0, depth_ = 0;
  bfloat16* to_ = nullptr;
  int64_t steps_ = 0, half_ = 0, step_ = 0, left_ = 0;
  alignas(64) bfloat16 edge_[kTileSize];
};

template <bool kOfSteps, bool kTransposed>
static void pack_tiles(StripTiles tiles) {
  while (tiles.left()) {
    const Tile tile = tiles.next();
    for (int quarter = 0; quarter < 4; ++quarter) pack_quarter<kOfSteps, kTransposed>(tile, quarter);
  }
}

}  // namespace vlcore::VLCORE_LEVEL
