// Chunked scan of S_t = d_t S_{t-1} + u_t B_t^T, y_t = S_t C_t + D x_t, and its derivative, where
// d = exp(log_decay) and u = scale x.
//
// One head of one sequence is walked kChunk tokens at a time, its (P, N) state in fp32. Within a
// chunk L[i][j] = d_{j+1} ... d_i (lower triangle), since_i = d_0 ... d_i, until_j = d_{j+1} ...
// d_last:
//   Y  = since (C S^T) + (C B^T * L) U + D X              S' = since_last S + (until U)^T B
// and backwards, where dS is the gradient of the state that leaves the chunk:
//   dC = since (dY S) + (dY U^T * L) B                    dU = until (B dS^T) + (C B^T * L)^T dY
//   dB = until (U dS) + (dY U^T * L)^T C                  dS of the state before = since_last dS
//                                                                                + (since dY)^T C
// Decays are products, row by row L_i = d_i L_{i-1}: one multiplication an element where a
// difference of running sums would cost an exponential and cancel when a strong step stands beside
// weak ones. It is also what the recurrence itself does, so a step of -inf is simply a reset. The
// gradient of log_decay_t is likewise a plain sum over all that passes from before t to t or later,
// never a difference of two large sums.
//
// A small chunk wins on a CPU: per token the products with the state cost 2 P N multiply-adds
// whatever the chunk, the ones within it about kChunk (P + N) / 2 more, and loads and stores of the
// state fall with 1 / kChunk. 32 beats 16 and 64 by a tenth and more, in both directions. What is
// left is two thirds multiply-adds, at their peak rate.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/operators.h"
#include "cpu/tile.h"

namespace reasoners {
namespace {

constexpr int64_t kChunk = 32;
constexpr int64_t kHeads = 4;  // walked together, at most
constexpr int64_t kPad = 16;   // a multiple of every Tile's rows and lanes

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Scratch memory of one thread, aligned to a cache line.
template <typename T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        memory_(c10::GetCPUAllocator()->allocate(rows * columns * sizeof(T))) {}
  T* operator[](int64_t row) const { return static_cast<T*>(memory_.get()) + row * columns; }
  void zero() const { std::fill((*this)[0], (*this)[rows], T(0)); }

  const int64_t rows, columns;

 private:
  c10::DataPtr memory_;
};

// A (batch, length, heads or groups, ...) argument with any strides but a contiguous last
// dimension of vectors. Heads past its own number share.
template <typename T>
struct View {
  View(const Tensor& t, int64_t heads)
      : data(t.const_data_ptr<T>()),
        batch(t.stride(0)),
        token(t.stride(1)),
        group(t.stride(2)),
        share(heads / t.size(2)) {}
  const T* at(int64_t b, int64_t t, int64_t head) const {
    return data + b * batch + t * token + head / share * group;
  }
  const T* data;
  int64_t batch, token, group, share;
};

template <typename scalar_t>
struct Arguments {
  using acc_t = at::opmath_type<scalar_t>;

  Arguments(const Tensor& x, const Tensor& log_decay, const Tensor& B, const Tensor& C,
            const OptionalTensor& scale, const OptionalTensor& D,
            const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
            int64_t sequences)
      : heads(log_decay.size(2)),
        head_dim(x.size(3)),
        state_dim(B.size(3)),
        length(x.size(1)),
        sequences(sequences),
        x(x, heads),
        B(B, heads),
        C(C, heads),
        log_decay(log_decay, heads),
        scale(scale ? std::optional<View<acc_t>>({*scale, heads}) : std::nullopt),
        D(D ? D->const_data_ptr<acc_t>() : nullptr),
        initial_state(initial_state ? initial_state->const_data_ptr<acc_t>() : nullptr),
        offsets(cu_seqlens ? cu_seqlens->const_data_ptr<int32_t>() : nullptr) {}

  struct Sequence {
    int64_t batch, begin, end;
  };
  Sequence sequence(int64_t i) const {
    if (offsets) return {0, offsets[i], offsets[i + 1]};
    return {i, 0, length};
  }

  int64_t heads, head_dim, state_dim, length, sequences;
  View<scalar_t> x, B, C;
  View<acc_t> log_decay;
  std::optional<View<acc_t>> scale;
  const acc_t *D, *initial_state;
  const int32_t* offsets;
};

// Start moving a row of the next chunk into the second-level cache, to read (0) or to write (1).
// Rows of a head lie far apart, so the processor's own prefetch does not follow them: without this
// half the time went into waiting. It is a hint: the address may lie outside the tensor.
template <int kWrite, typename T>
void prefetch(const T* row, int64_t width) {
  for (int64_t k = 0; k < width; k += 64 / sizeof(T)) __builtin_prefetch(row + k, kWrite, 2);
}

// Widened rows of `length` tokens, zero up to the padded extents.
template <typename scalar_t, typename acc_t>
void load_rows(const View<scalar_t>& from, int64_t batch, int64_t first, int64_t length,
               int64_t head, int64_t width, int64_t ahead, const Matrix<acc_t>& to) {
  const auto* row = from.at(batch, first, head);
  for (int64_t i = 0; i < length; ++i, row += from.token) {
    prefetch<0>(row + ahead * from.token, width);
    at::vec::convert(row, to[i], width);
    std::fill(to[i] + width, to[i + 1], acc_t(0));
  }
  std::fill(to[length], to[padded(length)], acc_t(0));
}

// The inputs of one chunk and its decays.
template <typename scalar_t>
struct Chunk {
  using acc_t = at::opmath_type<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;

  explicit Chunk(const Arguments<scalar_t>& arguments)
      : arguments(arguments),
        x(kChunk, padded(arguments.head_dim)),
        scaled_x(arguments.scale ? kChunk : 0, x.columns),
        until_u(kChunk, x.columns),
        L(kChunk, kChunk) {}

  void load(int64_t batch, int64_t first, int64_t size, int64_t head, int64_t ahead) {
    length = size;
    load_rows(arguments.x, batch, first, length, head, arguments.head_dim, ahead, x);
    load_scalars(arguments.log_decay, batch, first, head, decay);
    std::fill(scale, scale + length, acc_t(1));
    if (arguments.scale) load_scalars(*arguments.scale, batch, first, head, scale);
    std::fill(decay + length, decay + padded(length), acc_t(0));
    std::fill(scale + length, scale + padded(length), acc_t(0));

    for (int64_t i = 0; i < padded(length); i += Vec::size())
      Vec::loadu(decay + i).exp().store(decay + i);
    std::fill(L[0], L[1], acc_t(0));
    L[0][0] = 1;
    since[0] = decay[0];
    for (int64_t i = 1; i < padded(length); ++i) {
      for (int64_t j = 0; j < kChunk; ++j) L[i][j] = decay[i] * L[i - 1][j];
      L[i][i] = 1;
      since[i] = decay[i] * since[i - 1];
    }

    for (int64_t i = 0; i < padded(length); ++i) {
      if (arguments.scale)
        for (int64_t p = 0; p < x.columns; ++p) scaled_x[i][p] = scale[i] * x[i][p];
      for (int64_t p = 0; p < x.columns; ++p) until_u[i][p] = until()[i] * u()[i][p];
    }
  }
  void load_scalars(const View<acc_t>& from, int64_t batch, int64_t first, int64_t head,
                    acc_t* to) const {
    const acc_t* value = from.at(batch, first, head);
    for (int64_t i = 0; i < length; ++i, value += from.token) to[i] = *value;
  }

  const Matrix<acc_t>& u() const { return arguments.scale ? scaled_x : x; }
  const acc_t* until() const { return L[length - 1]; }
  acc_t whole() const { return since[length - 1]; }

  const Arguments<scalar_t>& arguments;
  int64_t length = 0;
  Matrix<acc_t> x, scaled_x, until_u, L;
  acc_t decay[kChunk], since[kChunk], scale[kChunk];
};

template <typename T>
void transpose(const Matrix<T>& from, int64_t rows, const Matrix<T>& to) {
  at::vec::transpose_mxn(from[0], from.columns, to[0], to.columns, static_cast<int>(rows),
                         static_cast<int>(from.columns));
}

// The sum of the products of their elements over the first `rows`.
template <typename T>
T inner_product(const Matrix<T>& a, const Matrix<T>& b, int64_t rows) {
  using Vec = at::vec::Vectorized<T>;
  Vec sum(T(0));
  for (int64_t k = 0; k < rows * a.columns; k += Vec::size())
    sum = at::vec::fmadd(Vec::loadu(a[0] + k), Vec::loadu(b[0] + k), sum);
  return lane_sum(sum);
}

// to = factor * from + A^T B, where A and B have `depth` rows.
template <typename T>
void advance(const Matrix<T>& from, T factor, const Matrix<T>& A, const Matrix<T>& B, int64_t depth,
             const Matrix<T>& to) {
  for (int64_t i = 0; i < to.rows; i += kRows)
    for (int64_t j = 0; j < to.columns; j += kLanes<T>) {
      Tile<T> sum;
      sum.load(from[i] + j, from.columns, factor);
      sum.add_product(A[0] + i, 1, A.columns, B[0] + j, B.columns, depth);
      sum.store(to[i] + j, to.columns);
    }
}

// Heads that one thread walks together, chunk by chunk, and no more than leaves every thread some
// work. Rows of one head are pages apart and those of neighbouring heads are not, so a few heads
// share the cost of finding the page (a tenth of the time), and C B^T where they share B and C.
template <typename scalar_t>
int64_t heads_together(const Arguments<scalar_t>& a) {
  int64_t block = 1;
  while (2 * block <= kHeads && a.heads % (2 * block) == 0 &&
         a.heads / (2 * block) * a.sequences >= at::get_num_threads())
    block *= 2;
  return block;
}

template <typename scalar_t>
void forward(const Arguments<scalar_t>& a, scalar_t* y, at::opmath_type<scalar_t>* final_state) {
  using acc_t = at::opmath_type<scalar_t>;
  const int P = static_cast<int>(a.head_dim), N = static_cast<int>(a.state_dim);
  const int64_t block = heads_together(a);
  at::parallel_for(0, a.heads / block * a.sequences, 1, [&](int64_t begin, int64_t end) {
    Chunk<scalar_t> chunk(a);
    const int64_t Pp = padded(P), Np = padded(N);
    const Matrix<acc_t> B(kChunk, Np), C(kChunk, Np), B_columns(Np, kChunk), out(kChunk, Pp);
    const Matrix<acc_t> dots(kChunk, kChunk), scores(kChunk, kChunk);  // C B^T, C B^T * L
    std::vector<Matrix<acc_t>> states;                                 // (N, P) of each head
    for (int64_t h = 0; h < block; ++h) states.emplace_back(Np, Pp);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first_head = unit / a.sequences * block, sequence = unit % a.sequences;
      const auto [batch, first, last] = a.sequence(sequence);
      for (int64_t h = 0; h < block; ++h) {
        const int64_t offset = (sequence * a.heads + first_head + h) * P * N;
        states[h].zero();
        if (a.initial_state)
          at::vec::transpose_mxn(a.initial_state + offset, N, states[h][0], Pp, P, N);
      }
      for (int64_t t = first; t < last; t += kChunk)
        for (int64_t h = 0; h < block; ++h) {
          const int64_t head = first_head + h, length = std::min(kChunk, last - t);
          const Matrix<acc_t>&state = states[h], &u = chunk.u(), &L = chunk.L;
          chunk.load(batch, t, length, head, kChunk);
          if (h == 0 || head % a.B.share == 0 || head % a.C.share == 0) {
            load_rows(a.B, batch, t, length, head, N, kChunk, B);
            load_rows(a.C, batch, t, length, head, N, kChunk, C);
            transpose(B, padded(length), B_columns);
            for (int64_t i = 0; i < length; i += kRows)
              for (int64_t j = 0; j < i + kRows; j += kLanes<acc_t>) {
                Tile<acc_t> dot;
                dot.add_product(C[i], Np, 1, B_columns[0] + j, kChunk, N);
                dot.store(dots[i] + j, kChunk);
              }
          }
          for (int64_t i = 0; i < length; ++i)
            for (int64_t j = 0; j < kChunk; ++j) scores[i][j] = dots[i][j] * L[i][j];
          for (int64_t i = 0; i < length; i += kRows)
            for (int64_t p = 0; p < P; p += kLanes<acc_t>) {
              Tile<acc_t> rows;
              rows.add_product(C[i], Np, 1, state[0] + p, Pp, N);
              rows.scale_rows(chunk.since + i);
              rows.add_product(scores[i], kChunk, 1, u[0] + p, Pp, i);
              rows.add_lower(scores[i] + i, kChunk, 1, u[i] + p, Pp);
              if (a.D) rows.add(chunk.x[i] + p, Pp, a.D[head]);
              rows.store(out[i] + p, Pp);
            }
          for (int64_t i = 0; i < length; ++i) {
            auto* row = y + ((batch * a.length + t + i) * a.heads + head) * P;
            prefetch<1>(row + kChunk * a.heads * P, P);
            at::vec::convert(out[i], row, P);
          }
          advance(state, chunk.whole(), B, chunk.until_u, length, state);
        }
      for (int64_t h = 0; h < block; ++h)
        at::vec::transpose_mxn(
            states[h][0], Pp, final_state + (sequence * a.heads + first_head + h) * P * N, N, N, P);
    }
  });
}

// A gradient that the heads of a group sum into, in the order of the heads. Heads that do not share
// store it at once in the dtype of the argument; others sum in the accumulation type.
template <typename scalar_t>
struct GroupSum {
  using acc_t = at::opmath_type<scalar_t>;

  GroupSum(const Tensor& argument, int64_t heads)
      : share(heads / argument.size(2)),
        dtype(argument.scalar_type()),
        sum(at::empty(
            argument.sizes(),
            argument.options().dtype(share == 1 ? dtype : c10::CppTypeToScalarType<acc_t>::value))),
        data(sum.mutable_data_ptr()) {}
  void add(int64_t token, int64_t head, const acc_t* row) const {
    const int64_t width = sum.size(3), offset = (token * sum.size(2) + head / share) * width;
    if (share == 1) {
      auto* to = static_cast<scalar_t*>(data) + offset;
      prefetch<1>(to - kChunk * sum.size(2) * width, width);
      at::vec::convert(row, to, width);
      return;
    }
    auto* to = static_cast<acc_t*>(data) + offset;
    if (head % share == 0) std::fill(to, to + width, acc_t(0));
    for (int64_t i = 0; i < width; ++i) to[i] += row[i];
  }
  Tensor result() const { return sum.to(dtype); }

  int64_t share;
  at::ScalarType dtype;
  Tensor sum;
  void* data;
};

template <typename acc_t>
struct WideGradients {
  acc_t *log_decay, *scale, *D, *initial_state;  // null when the input is absent
};

template <typename scalar_t>
void backward(const Arguments<scalar_t>& a, const Tensor& dy_rows,
              const at::opmath_type<scalar_t>* dfinal_state, const GroupSum<scalar_t>& dx,
              const GroupSum<scalar_t>& dB, const GroupSum<scalar_t>& dC,
              const WideGradients<at::opmath_type<scalar_t>>& wide) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t P = a.head_dim, N = a.state_dim;
  const View<scalar_t> dy_view(dy_rows, a.heads);
  std::vector<acc_t> sequence_dD(a.sequences * a.heads);
  int64_t longest = 0;
  for (int64_t s = 0; s < a.sequences; ++s)
    longest = std::max(longest, a.sequence(s).end - a.sequence(s).begin);
  const int64_t max_chunks = (longest + kChunk - 1) / kChunk;
  // A block of heads is closed under all sharing, so that one thread makes every group sum.
  const int64_t block = std::lcm(std::lcm(dx.share, dB.share), dC.share);

  at::parallel_for(0, a.heads / block * a.sequences, 1, [&](int64_t begin, int64_t end) {
    Chunk<scalar_t> chunk(a);
    const int64_t Pp = padded(P), Np = padded(N);
    const Matrix<acc_t> B(kChunk, Np), C(kChunk, Np), dy(kChunk, Pp), since_dy(kChunk, Pp);
    const Matrix<acc_t> B_columns(Np, kChunk), u_columns(Pp, kChunk);
    const Matrix<acc_t> scores(kChunk, kChunk);   // C B^T * L
    const Matrix<acc_t> dscores(kChunk, kChunk);  // dY U^T * L
    const Matrix<acc_t> dots(kChunk, kChunk);     // dY U^T
    const Matrix<acc_t> dx_rows(kChunk, Pp), dB_rows(kChunk, Np), dC_rows(kChunk, Np);
    const Matrix<acc_t> dstate(Pp, Np), dstate_columns(Np, Pp);
    std::vector<Matrix<acc_t>> states;  // before each chunk
    for (int64_t i = 0; i < std::max<int64_t>(max_chunks, 1); ++i) states.emplace_back(Pp, Np);

    for (int64_t unit = begin * block; unit < end * block; ++unit) {
      const int64_t head = unit / (block * a.sequences) * block + unit % block;
      const int64_t sequence = unit / block % a.sequences;
      const auto [batch, first, last] = a.sequence(sequence);
      const int64_t state_offset = (sequence * a.heads + head) * P * N;
      const int64_t num_chunks = (last - first + kChunk - 1) / kChunk;

      states[0].zero();
      if (a.initial_state)
        for (int64_t p = 0; p < P; ++p)
          std::copy_n(a.initial_state + state_offset + p * N, N, states[0][p]);
      for (int64_t c = 0; c + 1 < num_chunks; ++c) {
        chunk.load(batch, first + c * kChunk, kChunk, head, kChunk);
        load_rows(a.B, batch, first + c * kChunk, kChunk, head, N, kChunk, B);
        advance(states[c], chunk.whole(), chunk.until_u, B, kChunk, states[c + 1]);
      }

      dstate.zero();
      for (int64_t p = 0; p < P; ++p)
        std::copy_n(dfinal_state + state_offset + p * N, N, dstate[p]);
      acc_t dD = 0;
      for (int64_t c = num_chunks - 1; c >= 0; --c) {
        const int64_t t = first + c * kChunk, length = std::min(kChunk, last - t);
        const Matrix<acc_t>&state = states[c], &L = chunk.L, &u = chunk.u();
        chunk.load(batch, t, length, head, -kChunk);
        load_rows(a.B, batch, t, length, head, N, -kChunk, B);
        load_rows(a.C, batch, t, length, head, N, -kChunk, C);
        load_rows(dy_view, batch, t, length, head, P, -kChunk, dy);
        for (int64_t i = 0; i < padded(length); ++i)
          for (int64_t p = 0; p < Pp; ++p) since_dy[i][p] = chunk.since[i] * dy[i][p];
        transpose(B, padded(length), B_columns);
        transpose(u, padded(length), u_columns);
        transpose(dstate, Pp, dstate_columns);

        for (int64_t i = 0; i < length; i += kRows)
          for (int64_t j = 0; j < i + kRows; j += kLanes<acc_t>) {
            Tile<acc_t> score;
            score.add_product(C[i], Np, 1, B_columns[0] + j, kChunk, N);
            score.multiply(L[i] + j, kChunk);
            score.store(scores[i] + j, kChunk);
            Tile<acc_t> dot;
            dot.add_product(dy[i], Pp, 1, u_columns[0] + j, kChunk, P);
            dot.store(dots[i] + j, kChunk);
            dot.multiply(L[i] + j, kChunk);
            dot.store(dscores[i] + j, kChunk);
          }

        // What the state before the chunk gives to token i, what token j gives to the state after.
        acc_t received[kChunk] = {}, given[kChunk] = {}, dscale[kChunk] = {};
        for (int64_t i = 0; i < length; i += kRows) {
          const int64_t next = i + kRows, rest = std::max<int64_t>(length - next, 0);
          for (int64_t n = 0; n < N; n += kLanes<acc_t>) {
            Tile<acc_t> dC;
            dC.add_product(since_dy[i], Pp, 1, state[0] + n, Np, P);
            dC.add_row_dots(C[i] + n, Np, received + i);
            dC.add_product(dscores[i], kChunk, 1, B[0] + n, Np, i);
            dC.add_lower(dscores[i] + i, kChunk, 1, B[i] + n, Np);
            dC.store(dC_rows[i] + n, Np);

            Tile<acc_t> dB;
            dB.add_product(chunk.until_u[i], Pp, 1, dstate[0] + n, Np, P);
            dB.add_row_dots(B[i] + n, Np, given + i);
            dB.add_upper(dscores[i] + i, 1, kChunk, C[i] + n, Np);
            if (rest) dB.add_product(dscores[next] + i, 1, kChunk, C[next] + n, Np, rest);
            dB.store(dB_rows[i] + n, Np);
          }
          for (int64_t p = 0; p < P; p += kLanes<acc_t>) {
            Tile<acc_t> dU;
            dU.add_product(B[i], Np, 1, dstate_columns[0] + p, Pp, N);
            dU.scale_rows(chunk.until() + i);
            dU.add_upper(scores[i] + i, 1, kChunk, dy[i] + p, Pp);
            if (rest) dU.add_product(scores[next] + i, 1, kChunk, dy[next] + p, Pp, rest);
            if (wide.scale) dU.add_row_dots(chunk.x[i] + p, Pp, dscale + i);
            dU.scale_rows(chunk.scale + i);
            if (a.D) dU.add(dy[i] + p, Pp, a.D[head]);
            dU.store(dx_rows[i] + p, Pp);
          }
        }
        for (int64_t i = 0; i < length; ++i) {
          const int64_t token = batch * a.length + t + i;
          dx.add(token, head, dx_rows[i]);
          dB.add(token, head, dB_rows[i]);
          dC.add(token, head, dC_rows[i]);
          if (wide.scale) wide.scale[token * a.heads + head] = dscale[i];
        }

        // d log_decay_i is all that passes from before i to i or later.
        acc_t crossing[kChunk + 1];  // from the state before and from j < i to the state after
        crossing[0] = chunk.whole() * inner_product(state, dstate, Pp);
        for (int64_t i = 0; i < length; ++i) crossing[i + 1] = crossing[i] + given[i];
        acc_t to_later[kChunk] = {};  // from j to tokens >= i
        acc_t from_state = 0;         // from the state before to tokens >= i
        for (int64_t i = length - 1; i >= 0; --i) {
          acc_t sum = 0;
          for (int64_t j = 0; j < i; ++j) {
            to_later[j] += dots[i][j] * scores[i][j];
            sum += to_later[j];
          }
          from_state += received[i];
          wide.log_decay[(batch * a.length + t + i) * a.heads + head] =
              sum + from_state + crossing[i];
        }
        if (wide.D) dD += inner_product(dy, chunk.x, length);
        advance(dstate, chunk.whole(), since_dy, C, length, dstate);
      }
      sequence_dD[sequence * a.heads + head] = dD;
      if (wide.initial_state)
        for (int64_t p = 0; p < P; ++p)
          std::copy_n(dstate[p], N, wide.initial_state + state_offset + p * N);
    }
  });
  if (wide.D) {
    std::fill_n(wide.D, a.heads, acc_t(0));
    for (int64_t i = 0; i < a.sequences * a.heads; ++i) wide.D[i % a.heads] += sequence_dD[i];
  }
}

// A tensor whose last dimension is a contiguous vector.
Tensor vectors(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }
}  // namespace

std::tuple<Tensor, Tensor> cpu::ssd_scan(const Tensor& x, const Tensor& log_decay, const Tensor& B,
                                         const Tensor& C, const OptionalTensor& scale,
                                         const OptionalTensor& D,
                                         const OptionalTensor& initial_state,
                                         const OptionalTensor& cu_seqlens) {
  const int64_t sequences =
      check_ssd_scan("ssd_scan", x, log_decay, B, C, scale, D, initial_state, cu_seqlens);
  const auto offsets = contiguous(cu_seqlens);
  if (offsets) Check{"ssd_scan"}.boundaries("cu_seqlens", *offsets, x.size(1));
  const int64_t heads = log_decay.size(2);
  auto y = at::empty({x.size(0), x.size(1), heads, x.size(3)}, x.options());
  auto final_state = at::empty({sequences, heads, x.size(3), B.size(3)}, log_decay.options());
  const auto x_rows = vectors(x), B_rows = vectors(B), C_rows = vectors(C);
  const auto skip = contiguous(D), initial = contiguous(initial_state);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "ssd_scan", [&] {
    const Arguments<scalar_t> arguments(x_rows, log_decay, B_rows, C_rows, scale, skip, initial,
                                        offsets, sequences);
    forward(arguments, y.mutable_data_ptr<scalar_t>(),
            final_state.mutable_data_ptr<at::opmath_type<scalar_t>>());
  });
  return {y, final_state};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ssd_scan_backward(
    const Tensor& dy, const Tensor& dfinal_state, const Tensor& x, const Tensor& log_decay,
    const Tensor& B, const Tensor& C, const OptionalTensor& scale, const OptionalTensor& D,
    const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  constexpr const char* op = "ssd_scan_backward";
  const int64_t sequences =
      check_ssd_scan(op, x, log_decay, B, C, scale, D, initial_state, cu_seqlens);
  const int64_t heads = log_decay.size(2);
  const Check check{op};
  check.tensor("dy", dy, x, x.scalar_type(), {x.size(0), x.size(1), heads, x.size(3)},
               "(batch, length, H, P)");
  check.tensor("dfinal_state", dfinal_state, x, log_decay.scalar_type(),
               {sequences, heads, x.size(3), B.size(3)}, "(batch or sequences, H, P, N)");
  const auto offsets = cpu::contiguous(cu_seqlens);
  if (offsets) check.boundaries("cu_seqlens", *offsets, x.size(1));
  const auto x_rows = vectors(x), B_rows = vectors(B), C_rows = vectors(C), dy_rows = vectors(dy);
  const auto skip = cpu::contiguous(D), initial = cpu::contiguous(initial_state);
  const auto dfinal = dfinal_state.contiguous();
  const auto gradient = [&](bool wanted, at::IntArrayRef sizes) {
    return at::empty(wanted ? sizes : at::IntArrayRef{0}, log_decay.options());
  };
  auto dlog_decay = gradient(true, log_decay.sizes());
  auto dscale = gradient(scale.has_value(), log_decay.sizes());
  auto dD = gradient(D.has_value(), {heads});
  auto dinitial_state = gradient(initial_state.has_value(), dfinal_state.sizes());
  Tensor dx, dB, dC;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), op, [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Arguments<scalar_t> arguments(x_rows, log_decay, B_rows, C_rows, scale, skip, initial,
                                        offsets, sequences);
    const GroupSum<scalar_t> x_sum(x, heads), B_sum(B, heads), C_sum(C, heads);
    const auto data = [](const OptionalTensor& wanted, Tensor& t) {
      return wanted ? t.mutable_data_ptr<acc_t>() : nullptr;
    };
    backward(arguments, dy_rows, dfinal.const_data_ptr<acc_t>(), x_sum, B_sum, C_sum,
             {dlog_decay.mutable_data_ptr<acc_t>(), data(scale, dscale), data(D, dD),
              data(initial_state, dinitial_state)});
    dx = x_sum.result();
    dB = B_sum.result();
    dC = C_sum.result();
  });
  return {dx, dlog_decay, dB, dC, dscale, dD, dinitial_state};
}

TORCH_LIBRARY_IMPL(reasoners, CPU, m) {
  m.impl("ssd_scan", &cpu::ssd_scan);
  m.impl("ssd_scan_backward", &ssd_scan_backward);
}

}  // namespace
}  // namespace reasoners
