// QuantizedRows, as the level multiplies best. Read once per level.
#if defined(VLCORE_BF16_DOT)
#include "cpu/quantized_integers.h"
#else
#include "cpu/quantized_floats.h"
#endif
