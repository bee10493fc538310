#pragma once
#include <cstdint>

// VLCORE_CLONES before a function compiles it for several levels of x86; the one that fits the machine is chosen when
// the extension is loaded, so that what is built on one machine runs on another. Put it on the function that holds the
// loops: what OpenMP makes of a parallel region is not cloned.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__clang__) && __clang_major__ >= 17
#define VLCORE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define VLCORE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define VLCORE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VLCORE_CLONES
#endif
