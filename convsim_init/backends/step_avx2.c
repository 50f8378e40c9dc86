/* step.c for processors with AVX2. */
#if defined(__x86_64__) && (defined(__ELF__) || defined(MOVES_UNALIGNED)) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define LANES 8
#include "step.c"
#endif
