// What the tests of the core need of a test framework.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

struct Test {
  std::string name;
  std::function<void()> body;
  static std::vector<Test>& all() {
    static std::vector<Test> tests;
    return tests;
  }
  Test(std::string name, std::function<void()> body) : name(std::move(name)), body(std::move(body)) {
    all().push_back(*this);
  }
};

#define TEST(name)                        \
  static void name();                     \
  static const Test name##_(#name, name); \
  static void name()

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)

// |found - wanted| <= relative |wanted| + absolute
#define CHECK_NEAR(found, wanted, relative, absolute)                                                            \
  do {                                                                                                           \
    const double found_ = (found), wanted_ = (wanted);                                                           \
    if (!(std::abs(found_ - wanted_) <= (relative) * std::abs(wanted_) + (absolute))) {                          \
      std::fprintf(stderr, "%s:%d: %s is %.17g, expected %.17g\n", __FILE__, __LINE__, #found, found_, wanted_); \
      std::exit(1);                                                                                              \
    }                                                                                                            \
  } while (false)
