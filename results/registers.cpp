// How many operations a second the registers of both cores do, memory left out: what no program here can pass. A multiplication and an
// addition are two operations.
//
//     g++ -O3 -march=native -pthread results/registers.cpp -o registers && ./registers
//
// All sums must stay in registers (look for vmovaps between them with objdump -d): where the compiler spills them to the stack, this
// measures its stores, half of the rate.

#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <thread>

#define LOOP(NAME, INSTRUCTION)                                                                          \
    void NAME(long repeats) {                                                                            \
        __m512 sum[16], x = _mm512_setzero_ps();                                                         \
        _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) sum[i] = x;                                \
        for (long k = 0; k < repeats; k++) {                                                             \
            _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++)                                        \
                asm volatile(INSTRUCTION " %1, %1, %0" : "+v"(sum[i]) : "v"(x));                         \
        }                                                                                                \
    }
LOOP(float32, "vfmadd231ps")
LOOP(bfloat16, "vdpbf16ps")
LOOP(int16, "vpdpwssd")
LOOP(int8, "vpdpbusd")

static void measure(const char* name, void (*loop)(long), int operations) {
    const long repeats = 100000000;
    auto start = std::chrono::steady_clock::now();
    std::thread other(loop, repeats);
    loop(repeats);
    other.join();
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    printf("%-8s %.3f T operations/s on two cores\n", name, 2 * 16 * repeats * operations / seconds.count() / 1e12);
}

int main() {
    for (int round = 0; round < 2; round++) {
        measure("float32", float32, 32);
        measure("bfloat16", bfloat16, 64);
        measure("int16", int16, 64);
        measure("int8", int8, 128);
    }
}
