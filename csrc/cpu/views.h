// Matrices as products read them, and how they are cut; included by matrix_product.h, at one level.
namespace vlcore::VLCORE_LEVEL {

// Element (i, j) stands at i * row + j * col; one of the two is 1.
template <typename T>
struct View {
  const T* data;
  int64_t row, col;
  const T* at(int64_t i, int64_t j) const { return data + i * row + j * col; }
  View from(int64_t i, int64_t j) const { return {at(i, j), row, col}; }
};

// How many parts of at most `block` there are of `size`.
constexpr int64_t parts(int64_t size, int64_t block) { return (size + block - 1) / block; }

// `size` in parts of at most `block`, as even as multiples of `grain` are.
static int64_t even_block(int64_t size, int64_t block, int64_t grain) {
  return std::max(round_up(parts(size, std::max<int64_t>(parts(size, block), 1)), grain), grain);
}

}  // namespace vlcore::VLCORE_LEVEL
