/* Small perceptrons on a CPU: all layers of a few rows at a time, so that what is between them stays in the cache.
 *
 * What BLAS and an array library do layer by layer, over memory that a core has to fetch again for every operation, is
 * done here tile by tile: bias, product and activation of one layer, then of the next, and for the gradient the same
 * way back. Products run at the speed of the core's multipliers; what stands around them costs next to nothing.
 *
 * Written with the vector extensions of GCC and Clang. On x86 it wants AVX2 and FMA, which `supported` asks for when
 * it runs; elsewhere the compiler makes of 8 numbers what the processor has. Arithmetic is in a fixed order: the same
 * numbers give the same bits on the same machine, whatever else runs there.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

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
enum { MAX_LAYERS = 32 };

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

FAST static void go_forward(Matrix x, const Layer *layers, size count, const Matrix *outs, float *room, size room_each)
{
    for (size first = 0; first < x.rows; first += TILE) {
        size rows = least(TILE, x.rows - first);
        Matrix a = rows_from(x, first, rows);
        for (size l = 0; l < count; l++) {
            Matrix out = {room + (l % 2) * room_each, rows, layers[l].out, layers[l].out, 1}; /* nobody keeps it */
            if (outs[l].at)
                out = rows_from(outs[l], first, rows);
            through(a, layers[l].forth, 1, layers[l].activation, out);
            a = out;
        }
    }
}

FAST static void go_backward(Matrix dout, Matrix x, const Layer *layers, size count, const Matrix *outs, Matrix dx,
                             float *room, size room_each)
{
    float *dz = room, *between[2] = {room + room_each, room + 2 * room_each}, *sums = room + 3 * room_each;
    for (size l = 0; l < count; l++) {
        memset(layers[l].dweight, 0, sizeof(float) * layers[l].in * layers[l].out);
        memset(layers[l].dbias, 0, sizeof(float) * layers[l].out);
    }
    for (size first = 0; first < x.rows; first += TILE) {
        size rows = least(TILE, x.rows - first);
        Matrix dy = rows_from(dout, first, rows);
        for (size l = count - 1; l >= 0; l--) {
            const Layer *layer = &layers[l];
            size stride = padded(layer->out);
            memset(sums, 0, sizeof(float) * stride);
            take_in(dy, outs[l].at ? outs[l].at + first * layer->out : NULL, layer->activation, dz, sums);
            for (size i = 0; i < layer->out; i++)
                layer->dbias[i] += sums[i];
            Matrix a = transposed(rows_from(l ? outs[l - 1] : x, first, rows));
            for (size j = 0; j < layer->out; j += PANEL) {
                Matrix dweight = {layer->dweight + j, layer->in, layer->out - j, layer->out, 1};
                column_identity(a, dz + j, stride, NULL, 1, dweight, (int)least(PANEL, layer->out - j));
            }
            if (layer->back) {
                Matrix before = {between[l % 2], rows, layer->in, layer->in, 1};
                if (!l)
                    before = rows_from(dx, first, rows);
                through((Matrix){dz, rows, layer->out, stride, 1}, layer->back, 0, IDENTITY, before);
                dy = before;
            }
        }
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
static int borrow_layers(Borrowed *borrowed, size rows, size columns, PyObject *weights, PyObject *activations,
                         PyObject *outs, int writable, Layer *layers, Matrix *kept)
{
    if (count_items(weights, "weights", -1) < 0)
        return -1;
    size count = PyTuple_Size(weights);
    char *codes;
    size length;
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
        layers[l] = (Layer){.in = weight.rows, .out = columns, .activation = codes[l], .weight = weight.at};
        kept[l] = (Matrix){0};
        if (out != Py_None &&
            borrow(borrowed, out, "out", 2, rows, columns, l == count - 1, writable, &kept[l]) < 0)
            return -1;
    }
    return 0;
}

static size widest(const Layer *layers, size count)
{
    size widest = padded(layers[0].in);
    for (size l = 0; l < count; l++)
        if (padded(layers[l].out) > widest)
            widest = padded(layers[l].out);
    return widest;
}

/* Room for panels and `tiles` tiles; the tiles come first. */
static float *make_room(Layer *layers, size count, size each, size tiles)
{
    size numbers = each * (tiles + 1);
    for (size l = 0; l < count; l++)
        numbers += (layers[l].in + 1) * padded(layers[l].out) + (layers[l].out + 1) * padded(layers[l].in);
    float *room = aligned_alloc(64, sizeof(float) * (size_t)numbers);
    if (!room)
        PyErr_NoMemory();
    else
        memset(room, 0, sizeof(float) * (size_t)each); /* what pads the tile of gradients must be numbers */
    return room;
}

PyDoc_STRVAR(forward_doc, "forward(x, weights, biases, activations, outs)\n\n"
                          "Write what each layer says of x [N, in] into outs; None there keeps nothing of a layer.");

static PyObject *forward(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *x_array, *weights, *biases, *activations, *outs;
    if (!PyArg_ParseTuple(args, "OOOOO", &x_array, &weights, &biases, &activations, &outs))
        return NULL;
    Borrowed borrowed = {.count = 0};
    Layer layers[MAX_LAYERS];
    Matrix kept[MAX_LAYERS], x, bias;
    float *room = NULL;
    int done = 0;
    if (borrow(&borrowed, x_array, "x", 2, -1, -1, 1, 0, &x) < 0 ||
        borrow_layers(&borrowed, x.rows, x.columns, weights, activations, outs, 1, layers, kept) < 0)
        goto end;
    size count = PyTuple_Size(weights), each = TILE * widest(layers, count);
    if (count_items(biases, "biases", count) < 0)
        goto end;
    for (size l = 0; l < count; l++) {
        if (borrow(&borrowed, PyTuple_GetItem(biases, l), "bias", 1, -1, layers[l].out, 0, 0, &bias) < 0)
            goto end;
        layers[l].bias = bias.at;
    }
    if (!kept[count - 1].at) {
        PyErr_SetString(PyExc_ValueError, "outs must hold an array for the last layer");
        goto end;
    }
    if (!(room = make_room(layers, count, each, 2)))
        goto end;
    Py_BEGIN_ALLOW_THREADS;
    float *to = room + 2 * each;
    for (size l = 0; l < count; l++) {
        Layer *layer = &layers[l];
        layer->forth = to;
        to = pack(to, (Matrix){(float *)layer->weight, layer->in, layer->out, layer->out, 1}, layer->bias);
    }
    go_forward(x, layers, count, kept, room, each);
    Py_END_ALLOW_THREADS;
    done = 1;
end:
    free(room);
    give_back(&borrowed);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(backward_doc,
             "backward(dout, x, outs, weights, activations, dweights, dbiases, dx)\n\n"
             "Write the gradient of every weight and bias, and of x [N, in] if dx is not None, for that of what came "
             "out, [N, out]; outs are those of `forward`, of which the last may be None if it has no activation.");

static PyObject *backward(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *dout_array, *x_array, *outs, *weights, *activations, *dweights, *dbiases, *dx_array;
    if (!PyArg_ParseTuple(args, "OOOOOOOO", &dout_array, &x_array, &outs, &weights, &activations, &dweights, &dbiases,
                          &dx_array))
        return NULL;
    Borrowed borrowed = {.count = 0};
    Layer layers[MAX_LAYERS];
    Matrix kept[MAX_LAYERS], x, dout, gradient, dx = {0};
    float *room = NULL;
    int done = 0;
    if (borrow(&borrowed, x_array, "x", 2, -1, -1, 1, 0, &x) < 0 ||
        borrow_layers(&borrowed, x.rows, x.columns, weights, activations, outs, 0, layers, kept) < 0)
        goto end;
    size count = PyTuple_Size(weights), each = TILE * widest(layers, count);
    if (count_items(dweights, "dweights", count) < 0 || count_items(dbiases, "dbiases", count) < 0)
        goto end;
    for (size l = 0; l < count; l++) {
        Layer *layer = &layers[l];
        if (borrow(&borrowed, PyTuple_GetItem(dweights, l), "dweight", 2, layer->in, layer->out, 0, 1, &gradient) < 0)
            goto end;
        layer->dweight = gradient.at;
        if (borrow(&borrowed, PyTuple_GetItem(dbiases, l), "dbias", 1, -1, layer->out, 0, 1, &gradient) < 0)
            goto end;
        layer->dbias = gradient.at;
        if (!kept[l].at && (l < count - 1 || layer->activation != IDENTITY)) {
            PyErr_SetString(PyExc_ValueError, "outs must hold what came out of each layer with an activation");
            goto end;
        }
        if (kept[l].at && layer->activation != IDENTITY && (kept[l].column != 1 || kept[l].row != layer->out)) {
            PyErr_SetString(PyExc_ValueError, "what came out of a layer with an activation must be contiguous");
            goto end;
        }
    }
    if (borrow(&borrowed, dout_array, "dout", 2, x.rows, layers[count - 1].out, 1, 0, &dout) < 0 ||
        (dx_array != Py_None && borrow(&borrowed, dx_array, "dx", 2, x.rows, x.columns, 1, 1, &dx) < 0) ||
        !(room = make_room(layers, count, each, 4)))
        goto end;
    Py_BEGIN_ALLOW_THREADS;
    float *to = room + 4 * each;
    for (size l = 0; l < count; l++) {
        Layer *layer = &layers[l];
        layer->back = l || dx.at ? to : NULL;
        if (layer->back)
            to = pack(to, (Matrix){(float *)layer->weight, layer->out, layer->in, 1, layer->out}, NULL);
    }
    go_backward(dout, x, layers, count, kept, dx, room, each);
    Py_END_ALLOW_THREADS;
    done = 1;
end:
    free(room);
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
