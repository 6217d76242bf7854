// One build for every x86-64: functions marked DEPTHPRUNE_CLONES are compiled for AVX-512, AVX2 and the base
// instruction set, and the loader picks one by cpuid. Other compilers and architectures compile plain code.
#pragma once

#include <cstdlib>  // __GLIBC__

// glibc: the choice is made through an ifunc, which musl does not have.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define DEPTHPRUNE_HAS_CLONES 1
// Sanitizers are not ready yet when the loader asks which clone to take.
#if defined(DEPTHPRUNE_SANITIZE)
#define DEPTHPRUNE_CLONES
#else
#define DEPTHPRUNE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#else
#define DEPTHPRUNE_HAS_CLONES 0
#define DEPTHPRUNE_CLONES
#endif

// What a clone calls must be inlined into it, or it is compiled for the base instruction set only.
#if defined(__GNUC__)
#define DEPTHPRUNE_INLINE inline __attribute__((always_inline))
#else
#define DEPTHPRUNE_INLINE __forceinline
#endif

// Asks for the line of an address, into the first- or the second-level cache.
#if defined(__GNUC__)
#define DEPTHPRUNE_PREFETCH(address) __builtin_prefetch(address)
#define DEPTHPRUNE_PREFETCH_L2(address) __builtin_prefetch(address, 0, 2)
#else
#define DEPTHPRUNE_PREFETCH(address) static_cast<void>(address)
#define DEPTHPRUNE_PREFETCH_L2(address) static_cast<void>(address)
#endif
