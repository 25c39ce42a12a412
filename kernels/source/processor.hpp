// What the processor and its system can do. Each of these asks once.
#pragma once

namespace minigpt4 {

bool has_avx2();  // With FMA and F16C.
bool has_avxvnni();
bool has_avx512();  // F, BW, DQ and VL.
bool has_avx512vnni();
bool has_avx512bf16();  // With VNNI.
bool has_amx();         // Tiles of bytes, with all of the above. Asks the system for their registers.
bool has_neon_dotprod();

}  // namespace minigpt4
