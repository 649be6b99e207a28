"""Operations in C++ for the CPU, compiled where they run: one call computes an engine step."""
