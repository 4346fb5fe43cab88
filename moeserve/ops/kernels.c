/* CPU forms of moeserve's ops, compiled on the machine where they run (see build.py); no Python, no OpenMP.
 *
 * Each header holds ops written once and included for float32 and for bfloat16; sums run in float32 in both.
 * A row's result does not depend on the other rows of the call nor on the number of threads.
 */
#include "parallel.h"
#include "simd.h"
#include "spread.h"

#define ELEM_IS_BF16 0
#define elem float
#define FN(name) name##_f32
#include "typed.h"
#undef ELEM_IS_BF16
#undef elem
#undef FN
#undef STEP

#define ELEM_IS_BF16 1
#define elem bf16
#define FN(name) name##_bf16
#include "typed.h"
