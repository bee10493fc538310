// Products of whole tiles (AMX), at one level; read once per level by tile.h. A tile is 16 rows of 64 bytes. At a level
// that has none, TileUnit is empty.
//
// The instructions are written out: GCC's intrinsics do not say that they read and write memory.
namespace vlcore::VLCORE_LEVEL {

#if defined(VLCORE_AMX)

// While one lives, this thread's tiles are 0 to 3 for sums and 4 to 7 for operands, all of whole size. It leaves the
// unit set up as it was found, as other libraries may rely on it between their calls; what the tiles held is lost.
class TileUnit {
 public:
  TileUnit() {
    asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
    Shapes shapes = {};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = 64, shapes.rows[tile] = 16;
    asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
  }
  ~TileUnit() {
    if (before_.palette) {
      asm volatile("ldtilecfg %0" ::"m"(before_) : "memory");
    } else {
      asm volatile("tilerelease" ::: "memory");
    }
  }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Shapes before_;
};

template <int tile>
VLCORE_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}

// As load_tile, of what is not to take the place of other data in the first-level cache.
template <int tile>
VLCORE_INLINE void load_passing_tile(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
VLCORE_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
VLCORE_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// sums (16, 16) += a (16, 32) b (16, 16, 2).
template <int sums, int a, int b>
VLCORE_INLINE void multiply_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

// 16 rows of A times kTiles times 16 columns of a panel, which lie side by side: C = A B, or C + A B. `depth` is a
// multiple of 32; strides are in elements.
template <int kTiles, int kWidth>
VLCORE_INLINE void multiply_tiles(const bfloat16* a, int64_t a_stride, const bfloat16* panel, int64_t depth, bool adds,
                                  float* c, int64_t c_stride) {
  static_assert(1 <= kTiles && kTiles <= 4);
  if (adds) {
    load_tile<0>(c, c_stride * 4);
    if constexpr (kTiles > 1) load_tile<1>(c + 16, c_stride * 4);
    if constexpr (kTiles > 2) load_tile<2>(c + 32, c_stride * 4);
    if constexpr (kTiles > 3) load_tile<3>(c + 48, c_stride * 4);
  } else {
    clear_tile<0>();
    if constexpr (kTiles > 1) clear_tile<1>();
    if constexpr (kTiles > 2) clear_tile<2>();
    if constexpr (kTiles > 3) clear_tile<3>();
  }
  for (int64_t d = 0; d < depth; d += 32, panel += 32 * kWidth) {
    load_tile<4>(a + d, a_stride * 2);
    load_tile<5>(panel, kWidth * 4);
    multiply_tile<0, 4, 5>();
    if constexpr (kTiles > 1) {
      load_tile<6>(panel + 32, kWidth * 4);
      multiply_tile<1, 4, 6>();
    }
    if constexpr (kTiles > 2) {
      load_tile<7>(panel + 64, kWidth * 4);
      multiply_tile<2, 4, 7>();
    }
    if constexpr (kTiles > 3) {
      load_tile<5>(panel + 96, kWidth * 4);
      multiply_tile<3, 4, 5>();
    }
  }
  store_tile<0>(c, c_stride * 4);
  if constexpr (kTiles > 1) store_tile<1>(c + 16, c_stride * 4);
  if constexpr (kTiles > 2) store_tile<2>(c + 32, c_stride * 4);
  if constexpr (kTiles > 3) store_tile<3>(c + 48, c_stride * 4);
}

#else

struct TileUnit {
  TileUnit() {}
};

#endif

}  // namespace vlcore::VLCORE_LEVEL
