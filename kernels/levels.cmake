# The levels of the processor that is built for: `level_sources`, each compiled for its
# instructions, and `level_definitions`. Everything else is compiled for what every processor of the
# family has.
string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
if(CMAKE_OSX_ARCHITECTURES)
  set(processor "${CMAKE_OSX_ARCHITECTURES}")
endif()
set(level_directory "${CMAKE_CURRENT_LIST_DIR}/source")
set(level_sources "${level_directory}/portable.cpp")
set(level_definitions "")

# The options of other compilers, behind that of MSVC.
function(add_level name msvc)
  set(file "${level_directory}/${name}.cpp")
  if(MSVC)
    set(options "${msvc}")
  else()
    set(options "${ARGN}")
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # These passes put off additions until more sums wait for them than there are registers.
      list(APPEND options -fno-tree-reassoc -fno-tree-ter)
    endif()
  endif()
  set_source_files_properties("${file}" PROPERTIES COMPILE_OPTIONS "${options}")
  set(level_sources "${level_sources};${file}" PARENT_SCOPE)
endfunction()

if(processor MATCHES "x86_64|amd64")
  list(APPEND level_definitions MINIGPT4_X86)
  set(avx2 -mavx2 -mfma -mf16c)
  # GCC 12 takes values that its own intrinsics leave open for unset ones.
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-maybe-uninitialized)
  set(avx512vnni ${avx512} -mavx512vnni)
  add_level(avx2 /arch:AVX2 ${avx2})
  add_level(avxvnni /arch:AVX2 ${avx2} -mavxvnni)
  add_level(avx512 /arch:AVX512 ${avx512})
  add_level(avx512vnni /arch:AVX512 ${avx512vnni})
elseif(processor MATCHES "aarch64|arm64")
  list(APPEND level_definitions MINIGPT4_ARM)
  add_level(neon "" -march=armv8.2-a+dotprod)
endif()
