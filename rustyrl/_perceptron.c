/* Small perceptrons on a CPU: all layers of a few rows at a time, so that what is between them stays in the cache.
 *
 * What BLAS and an array library do layer by layer, over memory that a core has to fetch again for every operation, is
 * done here tile by tile: bias, product and activation of one layer, then of the next, and for the gradient the same
 * way back. Products run at the speed of the core's multipliers; what stands around them costs next to nothing.
 *
 * Written with the vector extensions of GCC and Clang. On x86 it wants AVX2 and FMA, which `supported` asks for when
 * it runs; elsewhere the compiler makes of 8 numbers what the processor has.
 *
 * Rows are cut into pieces that threads take as they are free, so that a core that is busy elsewhere holds nobody up.
 * Arithmetic is in a fixed order: the same numbers give the same bits on the same machine, with however many threads.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#define FAST __attribute__((target("avx2,fma")))
#else
#define FAST
#endif
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline)) FAST

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int mask __attribute__((vector_size(32)));
typedef Py_ssize_t size;

enum { LANE = 8, PANEL = 16, ROWS = 6, TILE = 48 }; /* ROWS x PANEL numbers are summed up in registers */
enum { IDENTITY, RELU, TANH, ACTIVATIONS };
enum { MAX_LAYERS = 32, MAX_THREADS = 64 };
enum { PIECES = 16, MIN_PIECE = 96, MAX_PARTIAL = 1 << 22 }; /* of rows, and of numbers in gradients of pieces */
enum { WORTH_SHARING = 1 << 22 }; /* products: a tenth of a millisecond of them; to wake somebody up takes a part of it */

/* Numbers that are not side by side: that of row r and column c is at[r * row + c * column]. */
typedef struct {
    float *at;
    size rows, columns, row, column;
} Matrix;

typedef struct {
    size in, out;
    int activation;
    const float *weight, *bias; /* [in, out], [out] */
    float *dweight, *dbias;
    size gradient; /* where its gradient begins among those of all layers: of the weight, then of the bias */
    float *forth; /* the weight in panels, with its bias before each */
    float *back;  /* the transposed weight in panels, or NULL where nobody asks for the gradient of what came in */
} Layer;

INLINE vec spread(float x) { return (vec){x, x, x, x, x, x, x, x}; }
INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec v) { *(vec *)at = v; }
INLINE vec choose(mask which, vec yes, vec no) { return (vec)(((mask)yes & which) | ((mask)no & ~which)); }

/* tanh by a quotient of polynomials of degree 13 and 6, within 2.5e-7 of it; the coefficients are of this form's
 * minimax fit, which Eigen and others use too. What is not a number stays so. */
INLINE vec hyperbolic_tangent(vec x)
{
    const vec limit = spread(7.90531110763549805f); /* the quotient is 1 there */
    x = choose(x > limit, limit, x);
    x = choose(x < -limit, -limit, x);
    vec s = x * x;
    vec above = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
    above = above * s - 8.60467152213735e-11f;
    above = above * s + 5.12229709037114e-08f;
    above = above * s + 1.48572235717979e-05f;
    above = above * s + 6.37261928875436e-04f;
    above = above * s + 4.89352455891786e-03f;
    vec below = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
    below = below * s + 2.26843463243900e-03f;
    below = below * s + 4.89352518554385e-03f;
    return x * above / below;
}

INLINE vec activate(vec z, int activation)
{
    if (activation == TANH)
        return hyperbolic_tangent(z);
    if (activation == RELU)
        return choose(z < spread(0), spread(0), z);
    return z;
}

/* How much of a gradient passes an activation that left y. */
INLINE vec pass(vec gradient, vec y, int activation)
{
    if (activation == TANH)
        return gradient * (1 - y * y);
    if (activation == RELU)
        return choose(y > spread(0), gradient, spread(0));
    return gradient;
}

/* Up to 6 rows and 16 columns of activation(start + a b), or of out + a b.
 *
 * a: [rows, depth]
 * panel: [depth, 16], rows `stride` apart; columns that `width` leaves out are read but not used
 * start: [16], or NULL for 0
 */
INLINE void block(int rows, int vectors, Matrix a, size depth, const float *panel, size stride, const float *start,
                  int activation, int add, Matrix out, int width)
{
    vec sum[ROWS][2];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[r][v] = start ? load(start + v * LANE) : spread(0);
    for (size k = 0; k < depth; k++) {
        vec b[2];
        UNROLL for (int v = 0; v < vectors; v++)
            b[v] = load(panel + k * stride + v * LANE);
        UNROLL for (int r = 0; r < rows; r++) {
            vec x = spread(a.at[r * a.row + k * a.column]);
            UNROLL for (int v = 0; v < vectors; v++)
                sum[r][v] += x * b[v];
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[r][v] = activate(sum[r][v], activation);
    if (out.column == 1 && width == vectors * LANE) {
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) {
                float *to = out.at + r * out.row + v * LANE;
                if (add)
                    sum[r][v] += load(to);
                store(to, sum[r][v]);
            }
        return;
    }
    UNROLL for (int r = 0; r < rows; r++) {
        float narrow[PANEL], *to = out.at + r * out.row;
        UNROLL for (int v = 0; v < vectors; v++)
            store(narrow + v * LANE, sum[r][v]);
        for (int i = 0; i < width; i++)
            to[i * out.column] = narrow[i] + (add ? to[i * out.column] : 0);
    }
}

/* All rows of a block of columns: a copy of `block` for each number of rows, whose sums then are registers. */
#define BLOCK(rows, vectors, activation) block(rows, vectors, a, depth, panel, stride, start, activation, add, out, width)
#define COLUMN_OF(vectors, activation)                                                                                 \
    for (; a.rows >= ROWS; a.rows -= ROWS, a.at += ROWS * a.row, out.at += ROWS * out.row)                             \
        BLOCK(ROWS, vectors, activation);                                                                              \
    switch (a.rows) {                                                                                                  \
    case 5: BLOCK(5, vectors, activation); break;                                                                      \
    case 4: BLOCK(4, vectors, activation); break;                                                                      \
    case 3: BLOCK(3, vectors, activation); break;                                                                      \
    case 2: BLOCK(2, vectors, activation); break;                                                                      \
    case 1: BLOCK(1, vectors, activation); break;                                                                      \
    }
#define COLUMN(name, activation)                                                                                       \
    FAST static void name(Matrix a, const float *panel, size stride, const float *start, int add, Matrix out,          \
                          int width)                                                                                   \
    {                                                                                                                  \
        size depth = a.columns;                                                                                        \
        if (width > LANE) {                                                                                            \
            COLUMN_OF(2, activation)                                                                                   \
        } else {                                                                                                       \
            COLUMN_OF(1, activation)                                                                                   \
        }                                                                                                              \
    }
COLUMN(column_identity, IDENTITY)
COLUMN(column_relu, RELU)
COLUMN(column_tanh, TANH)

static size least(size a, size b) { return a < b ? a : b; }
static size padded(size width) { return (width + PANEL - 1) / PANEL * PANEL; }

static Matrix rows_from(Matrix m, size first, size rows)
{
    m.at += first * m.row;
    m.rows = rows;
    return m;
}

static Matrix transposed(Matrix m) { return (Matrix){m.at, m.columns, m.rows, m.column, m.row}; }

/* out = activation(a weight + bias), of panels that `pack` made. */
FAST static void through(Matrix a, const float *panels, int biased, int activation, Matrix out)
{
    void (*column)(Matrix, const float *, size, const float *, int, Matrix, int) =
        activation == TANH ? column_tanh : activation == RELU ? column_relu : column_identity;
    size columns = out.columns;
    for (size j = 0; j < columns; j += PANEL) {
        column(a, panels + (biased ? PANEL : 0), PANEL, biased ? panels : NULL, 0, out, (int)least(PANEL, columns - j));
        panels += PANEL * (a.columns + (biased ? 1 : 0));
        out.at += PANEL * out.column;
    }
}

/* [depth, width] as panels of 16 columns, each with its bias first if there is one; 0 beyond the width. */
static float *pack(float *to, Matrix from, const float *bias)
{
    for (size j = 0; j < from.columns; j += PANEL) {
        size width = least(PANEL, from.columns - j);
        memset(to, 0, sizeof(float) * PANEL * (from.rows + (bias ? 1 : 0)));
        if (bias) {
            memcpy(to, bias + j, sizeof(float) * width);
            to += PANEL;
        }
        for (size k = 0; k < from.rows; k++, to += PANEL) {
            const float *row = from.at + k * from.row + j * from.column;
            if (from.column == 1 && width == PANEL)
                memcpy(to, row, sizeof(float) * PANEL);
            else
                for (size i = 0; i < width; i++)
                    to[i] = row[i * from.column];
        }
    }
    return to;
}

/* dz = what of dy passes the activation, [rows, padded], and its sums over rows, added up. */
FAST static void take_in(Matrix dy, const float *y, int activation, float *dz, float *sums)
{
    size width = dy.columns, stride = padded(width);
    for (size r = 0; r < dy.rows; r++, dz += stride) {
        const float *from = dy.at + r * dy.row, *kept = y + r * width;
        size i = 0;
        if (dy.column == 1)
            for (; i + LANE <= width; i += LANE) {
                vec g = load(from + i);
                if (activation == TANH)
                    g = pass(g, load(kept + i), TANH);
                else if (activation == RELU)
                    g = pass(g, load(kept + i), RELU);
                store(dz + i, g);
                store(sums + i, load(sums + i) + g);
            }
        for (; i < width; i++) {
            float g = from[i * dy.column];
            if (activation == TANH)
                g *= 1 - kept[i] * kept[i];
            else if (activation == RELU)
                g = kept[i] > 0 ? g : 0;
            dz[i] = g;
            sums[i] += g;
        }
    }
}

/* One way through a perceptron, for all rows.
 *
 * tile, tiles: numbers of a tile, and how many tiles a thread needs
 * rows_each: of a piece
 * parameters: how many numbers the gradients of all layers are
 * partial: [pieces, parameters], the gradients of each piece
 * next, threads: the piece to be taken next, and how many threads have taken any
 */
typedef struct Work {
    void (*go)(const struct Work *work, size begin, size end, float *room);
    Matrix x, dout, dx;
    Layer layers[MAX_LAYERS];
    Matrix outs[MAX_LAYERS];
    size count, tile, tiles, rows_each, pieces, parameters;
    float *room, *partial;
    size next, threads;
} Work;

FAST static void go_forward(const Work *work, size begin, size end, float *room)
{
    for (size first = begin; first < end; first += TILE) {
        size rows = least(TILE, end - first);
        Matrix a = rows_from(work->x, first, rows);
        for (size l = 0; l < work->count; l++) {
            const Layer *layer = &work->layers[l];
            Matrix out = {room + (l % 2) * work->tile, rows, layer->out, layer->out, 1}; /* if nobody keeps it */
            if (work->outs[l].at)
                out = rows_from(work->outs[l], first, rows);
            through(a, layer->forth, 1, layer->activation, out);
            a = out;
        }
    }
}

FAST static void go_backward(const Work *work, size begin, size end, float *room)
{
    size tile = work->tile;
    float *dz = room, *between[2] = {room + tile, room + 2 * tile}, *sums = room + 3 * tile;
    float *gradients = work->partial + begin / work->rows_each * work->parameters;
    memset(gradients, 0, sizeof(float) * work->parameters);
    memset(dz, 0, sizeof(float) * tile); /* what pads it is multiplied, too, and forgotten */
    for (size first = begin; first < end; first += TILE) {
        size rows = least(TILE, end - first);
        Matrix dy = rows_from(work->dout, first, rows);
        for (size l = work->count - 1; l >= 0; l--) {
            const Layer *layer = &work->layers[l];
            const float *kept = work->outs[l].at ? work->outs[l].at + first * layer->out : NULL;
            float *dweight = gradients + layer->gradient, *dbias = dweight + layer->in * layer->out;
            size stride = padded(layer->out);
            memset(sums, 0, sizeof(float) * stride);
            take_in(dy, kept, layer->activation, dz, sums);
            for (size i = 0; i < layer->out; i++)
                dbias[i] += sums[i];
            Matrix a = transposed(rows_from(l ? work->outs[l - 1] : work->x, first, rows));
            for (size j = 0; j < layer->out; j += PANEL) {
                Matrix columns = {dweight + j, layer->in, layer->out - j, layer->out, 1};
                column_identity(a, dz + j, stride, NULL, 1, columns, (int)least(PANEL, layer->out - j));
            }
            if (layer->back) {
                Matrix before = {between[l % 2], rows, layer->in, layer->in, 1};
                if (!l)
                    before = rows_from(work->dx, first, rows);
                through((Matrix){dz, rows, layer->out, stride, 1}, layer->back, 0, IDENTITY, before);
                dy = before;
            }
        }
    }
}

/* The gradients of all pieces together, in their order. */
FAST static void gather(const Work *work)
{
    for (size piece = 1; piece < work->pieces; piece++) {
        float *total = work->partial, *from = work->partial + piece * work->parameters;
        for (size i = 0; i < work->parameters; i++)
            total[i] += from[i];
    }
    for (size l = 0; l < work->count; l++) {
        const Layer *layer = &work->layers[l];
        const float *from = work->partial + layer->gradient;
        memcpy(layer->dweight, from, sizeof(float) * layer->in * layer->out);
        memcpy(layer->dbias, from + layer->in * layer->out, sizeof(float) * layer->out);
    }
}

/* --- threads --- */

static void take_pieces(Work *work)
{
    size thread = __atomic_fetch_add(&work->threads, 1, __ATOMIC_RELAXED), piece;
    float *room = work->room + thread * work->tiles * work->tile;
    while ((piece = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->pieces) {
        size begin = piece * work->rows_each;
        work->go(work, begin, least(begin + work->rows_each, work->x.rows), room);
    }
}

enum { PATIENCE = 20000 }; /* a fraction of a millisecond: to sleep for the rest of a piece takes longer than it */

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Threads that sleep until there is work, of one process; whoever comes while they have some does his own alone. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    Work *work; /* that may be joined */
    size wanted, inside, helpers;
    pid_t process;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static void *help(void *unused)
{
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.work || !pool.wanted)
            pthread_cond_wait(&pool.wake, &pool.lock);
        Work *work = pool.work;
        pool.wanted--;
        pool.inside++;
        pthread_mutex_unlock(&pool.lock);
        take_pieces(work);
        pthread_mutex_lock(&pool.lock);
        if (!__atomic_sub_fetch(&pool.inside, 1, __ATOMIC_RELEASE))
            pthread_cond_signal(&pool.done);
    }
    return unused;
}

static void lock_pool(void)
{
    if (pool.process != getpid()) { /* a child has none of its parent's threads */
        pthread_mutex_init(&pool.lock, NULL);
        pthread_cond_init(&pool.wake, NULL);
        pthread_cond_init(&pool.done, NULL);
        pool.work = NULL;
        pool.wanted = pool.inside = pool.helpers = 0;
        pool.process = getpid();
    }
    pthread_mutex_lock(&pool.lock);
}

static void do_work(Work *work, size threads)
{
    size helpers = least(threads, work->pieces) - 1;
    if (work->x.rows * work->parameters < WORTH_SHARING)
        helpers = 0;
    int ours = 0;
    if (helpers > 0) {
        lock_pool();
        for (pthread_t thread; pool.helpers < helpers; pool.helpers++) {
            if (pthread_create(&thread, NULL, help, NULL))
                break; /* with fewer, then */
            pthread_detach(thread);
        }
        if (!pool.work && !pool.inside) {
            ours = 1;
            pool.work = work;
            pool.wanted = least(helpers, pool.helpers);
            pthread_cond_broadcast(&pool.wake);
        }
        pthread_mutex_unlock(&pool.lock);
    }
    take_pieces(work);
    if (ours) {
        pthread_mutex_lock(&pool.lock);
        pool.work = NULL; /* who wakes up late finds nothing to do */
        pthread_mutex_unlock(&pool.lock);
        for (int i = 0; i < PATIENCE && __atomic_load_n(&pool.inside, __ATOMIC_ACQUIRE); i++)
            relax();
        pthread_mutex_lock(&pool.lock);
        while (pool.inside)
            pthread_cond_wait(&pool.done, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
    }
}

/* --- the way from and to Python --- */

enum { MAX_BUFFERS = 6 * MAX_LAYERS + 3 };

typedef struct {
    Py_buffer views[MAX_BUFFERS];
    size count;
} Borrowed;

static void give_back(Borrowed *borrowed)
{
    while (borrowed->count)
        PyBuffer_Release(&borrowed->views[--borrowed->count]);
}

/* The float32 numbers of an array with one or two axes; -1 and an exception if it is none. A `rows` or `columns` that
 * is not negative must be met; without `strided` the numbers must be side by side. */
static int borrow(Borrowed *borrowed, PyObject *array, const char *name, int axes, size rows, size columns, int strided,
                  int writable, Matrix *matrix)
{
    Py_buffer *view = &borrowed->views[borrowed->count];
    int flags = PyBUF_FORMAT | (strided ? PyBUF_STRIDES : PyBUF_C_CONTIGUOUS) | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(array, view, flags) < 0)
        return -1;
    borrowed->count++;
    if (view->itemsize != 4 || !view->format || strcmp(view->format, "f")) {
        PyErr_Format(PyExc_TypeError, "%s must hold float32, got format '%s'", name, view->format ? view->format : "B");
        return -1;
    }
    if (view->ndim != axes) {
        PyErr_Format(PyExc_ValueError, "%s must have %d axes, got %d", name, axes, view->ndim);
        return -1;
    }
    size of_rows = axes == 2 ? view->shape[0] : 1, of_columns = view->shape[axes - 1];
    if ((rows >= 0 && of_rows != rows) || (columns >= 0 && of_columns != columns)) {
        PyErr_Format(PyExc_ValueError, "%s must be [%zd, %zd], got [%zd, %zd]", name, rows < 0 ? of_rows : rows,
                     columns < 0 ? of_columns : columns, of_rows, of_columns);
        return -1;
    }
    size row = axes == 2 ? view->strides[0] : 0, column = view->strides[axes - 1];
    if (row % 4 || column % 4) {
        PyErr_Format(PyExc_ValueError, "%s has strides that are no multiple of 4 bytes", name);
        return -1;
    }
    *matrix = (Matrix){view->buf, of_rows, of_columns, row / 4, column / 4};
    return 0;
}

static int count_items(PyObject *tuple, const char *name, size expected)
{
    if (!PyTuple_Check(tuple) || (expected >= 0 && PyTuple_Size(tuple) != expected)) {
        PyErr_Format(PyExc_ValueError, "%s must be a tuple with an item for each layer", name);
        return -1;
    }
    return 0;
}

/* What both ways need of the layers: weights, activations and what came out of each. */
static int borrow_layers(Borrowed *borrowed, Work *work, PyObject *weights, PyObject *activations, PyObject *outs,
                         int writable)
{
    if (count_items(weights, "weights", -1) < 0)
        return -1;
    size count = PyTuple_Size(weights), columns = work->x.columns, length;
    char *codes;
    if (count < 1 || count > MAX_LAYERS) {
        PyErr_Format(PyExc_ValueError, "a perceptron has 1 to %d layers here, got %zd", MAX_LAYERS, count);
        return -1;
    }
    if (PyBytes_AsStringAndSize(activations, &codes, &length) < 0 || count_items(outs, "outs", count) < 0)
        return -1;
    if (length != count) {
        PyErr_Format(PyExc_ValueError, "%zd activations for %zd layers", length, count);
        return -1;
    }
    work->count = count;
    for (size l = 0; l < count; l++) {
        Matrix weight;
        PyObject *out = PyTuple_GetItem(outs, l);
        if (codes[l] < 0 || codes[l] >= ACTIVATIONS) {
            PyErr_Format(PyExc_ValueError, "there is no activation %d", codes[l]);
            return -1;
        }
        if (borrow(borrowed, PyTuple_GetItem(weights, l), "weight", 2, columns, -1, 0, 0, &weight) < 0)
            return -1;
        columns = weight.columns;
        work->layers[l] = (Layer){.in = weight.rows, .out = columns, .activation = codes[l], .weight = weight.at};
        if (out != Py_None &&
            borrow(borrowed, out, "out", 2, work->x.rows, columns, l == count - 1, writable, &work->outs[l]) < 0)
            return -1;
    }
    return 0;
}

/* The numbers that each thread needs, then those that all share: panels and gradients of pieces. */
static int make_room(Work *work, size threads, int gradients)
{
    size widest = padded(work->layers[0].in), panels = 0, pieces = PIECES;
    work->parameters = 0;
    for (size l = 0; l < work->count; l++) {
        Layer *layer = &work->layers[l];
        if (padded(layer->out) > widest)
            widest = padded(layer->out);
        panels += gradients ? layer->out * padded(layer->in) : (layer->in + 1) * padded(layer->out);
        layer->gradient = work->parameters;
        work->parameters += (layer->in + 1) * layer->out;
    }
    while (pieces > 1 && pieces * work->parameters > MAX_PARTIAL)
        pieces /= 2;
    work->rows_each = (work->x.rows + pieces * ROWS - 1) / (pieces * ROWS) * ROWS;
    if (work->rows_each < MIN_PIECE)
        work->rows_each = MIN_PIECE;
    work->pieces = work->x.rows ? (work->x.rows + work->rows_each - 1) / work->rows_each : 1;
    work->tile = TILE * widest;
    work->tiles = gradients ? 4 : 2;
    size numbers = least(threads, work->pieces) * work->tiles * work->tile + panels;
    if (gradients)
        numbers += work->pieces * work->parameters;
    work->room = aligned_alloc(64, (sizeof(float) * (size_t)numbers + 63) / 64 * 64);
    if (!work->room) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static float *shared_room(const Work *work, size threads)
{
    return work->room + least(threads, work->pieces) * work->tiles * work->tile;
}

static int check_threads(int threads)
{
    if (threads >= 1 && threads <= MAX_THREADS)
        return 0;
    PyErr_Format(PyExc_ValueError, "threads must be 1 to %d, got %d", MAX_THREADS, threads);
    return -1;
}

PyDoc_STRVAR(forward_doc, "forward(x, weights, biases, activations, outs, threads)\n\n"
                          "Write what each layer says of x [N, in] into outs; None there keeps nothing of a layer.");

static PyObject *forward(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *x, *weights, *biases, *activations, *outs;
    int threads, done = 0;
    if (!PyArg_ParseTuple(args, "OOOOOi", &x, &weights, &biases, &activations, &outs, &threads) ||
        check_threads(threads) < 0)
        return NULL;
    Borrowed borrowed = {.count = 0};
    Work work = {.go = go_forward};
    if (borrow(&borrowed, x, "x", 2, -1, -1, 1, 0, &work.x) < 0 ||
        borrow_layers(&borrowed, &work, weights, activations, outs, 1) < 0 ||
        count_items(biases, "biases", work.count) < 0)
        goto end;
    for (size l = 0; l < work.count; l++) {
        Matrix bias;
        if (borrow(&borrowed, PyTuple_GetItem(biases, l), "bias", 1, -1, work.layers[l].out, 0, 0, &bias) < 0)
            goto end;
        work.layers[l].bias = bias.at;
    }
    if (!work.outs[work.count - 1].at) {
        PyErr_SetString(PyExc_ValueError, "outs must hold an array for the last layer");
        goto end;
    }
    if (make_room(&work, threads, 0) < 0)
        goto end;
    Py_BEGIN_ALLOW_THREADS;
    float *to = shared_room(&work, threads);
    for (size l = 0; l < work.count; l++) {
        Layer *layer = &work.layers[l];
        layer->forth = to;
        to = pack(to, (Matrix){(float *)layer->weight, layer->in, layer->out, layer->out, 1}, layer->bias);
    }
    do_work(&work, threads);
    Py_END_ALLOW_THREADS;
    done = 1;
end:
    free(work.room);
    give_back(&borrowed);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(backward_doc,
             "backward(dout, x, outs, weights, activations, dweights, dbiases, dx, threads)\n\n"
             "Write the gradient of every weight and bias, and of x [N, in] if dx is not None, for that of what came "
             "out, [N, out]; outs are those of `forward`, of which the last may be None if it has no activation.");

static PyObject *backward(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *dout, *x, *outs, *weights, *activations, *dweights, *dbiases, *dx;
    int threads, done = 0;
    if (!PyArg_ParseTuple(args, "OOOOOOOOi", &dout, &x, &outs, &weights, &activations, &dweights, &dbiases, &dx,
                          &threads) ||
        check_threads(threads) < 0)
        return NULL;
    Borrowed borrowed = {.count = 0};
    Work work = {.go = go_backward};
    if (borrow(&borrowed, x, "x", 2, -1, -1, 1, 0, &work.x) < 0 ||
        borrow_layers(&borrowed, &work, weights, activations, outs, 0) < 0 ||
        count_items(dweights, "dweights", work.count) < 0 || count_items(dbiases, "dbiases", work.count) < 0)
        goto end;
    for (size l = 0; l < work.count; l++) {
        Layer *layer = &work.layers[l];
        Matrix *kept = &work.outs[l], gradient;
        if (borrow(&borrowed, PyTuple_GetItem(dweights, l), "dweight", 2, layer->in, layer->out, 0, 1, &gradient) < 0)
            goto end;
        layer->dweight = gradient.at;
        if (borrow(&borrowed, PyTuple_GetItem(dbiases, l), "dbias", 1, -1, layer->out, 0, 1, &gradient) < 0)
            goto end;
        layer->dbias = gradient.at;
        if (!kept->at && (l < work.count - 1 || layer->activation != IDENTITY)) {
            PyErr_SetString(PyExc_ValueError, "outs must hold what came out of each layer with an activation");
            goto end;
        }
        if (kept->at && layer->activation != IDENTITY && (kept->column != 1 || kept->row != layer->out)) {
            PyErr_SetString(PyExc_ValueError, "what came out of a layer with an activation must be contiguous");
            goto end;
        }
    }
    if (borrow(&borrowed, dout, "dout", 2, work.x.rows, work.layers[work.count - 1].out, 1, 0, &work.dout) < 0 ||
        (dx != Py_None && borrow(&borrowed, dx, "dx", 2, work.x.rows, work.x.columns, 1, 1, &work.dx) < 0) ||
        make_room(&work, threads, 1) < 0)
        goto end;
    Py_BEGIN_ALLOW_THREADS;
    work.partial = shared_room(&work, threads);
    float *to = work.partial + work.pieces * work.parameters;
    for (size l = 0; l < work.count; l++) {
        Layer *layer = &work.layers[l];
        if (l || work.dx.at) {
            layer->back = to;
            to = pack(to, (Matrix){(float *)layer->weight, layer->out, layer->in, 1, layer->out}, NULL);
        }
    }
    do_work(&work, threads);
    gather(&work);
    Py_END_ALLOW_THREADS;
    done = 1;
end:
    free(work.room);
    give_back(&borrowed);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(supported_doc, "supported() -> bool\n\nWhether this processor has the instructions that it is made of.");

static PyObject *supported(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(args))
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return PyBool_FromLong(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#else
    Py_RETURN_TRUE;
#endif
}

static PyMethodDef methods[] = {
    {"forward", forward, METH_VARARGS, forward_doc},
    {"backward", backward, METH_VARARGS, backward_doc},
    {"supported", supported, METH_NOARGS, supported_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_perceptron", "Perceptrons, compiled; see rustyrl/perceptron.py.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__perceptron(void) { return PyModuleDef_Init(&definition); }
