/* step.c for processors with AVX-512. */
#if defined(__x86_64__) && (defined(__ELF__) || defined(MOVES_UNALIGNED)) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512vl,avx512dq,fma")
#define LANES 16
#include "step.c"
#endif
