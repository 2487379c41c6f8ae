/* Small perceptrons on a CPU: what an actor's policy says, and the gradient of a learner's whole loss.
 *
 * A tile of rows goes through everything, forth and back, before the next: layers.h, and in between loss.h. Tiles make
 * pieces, which threads take: threads.h. Arithmetic is in a fixed order: the same numbers give the same bits on the same
 * machine, with however many threads.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vector.h"
#include "threads.h"
#include "layers.h"
#include "loss.h"

enum { MAX_LAYERS = 64, MAX_PARTIAL = 1 << 23 }; /* numbers in gradients of pieces */

/* --- what is asked for --- */

typedef struct {
    Work work;
    Matrix x;
    Layer layers[MAX_LAYERS];
    Matrix out;
    size count, widest;
} Forward;

FAST static void go_forward(const Work *work, size Py_UNUSED(piece), size begin, size end, float *room)
{
    const Forward *this = (const Forward *)work;
    for (size first = begin; first < end; first += TILE) {
        size rows = least(TILE, end - first);
        Matrix outs[MAX_LAYERS];
        for (size l = 0; l < this->count; l++) {
            size width = this->layers[l].out;
            outs[l] = (Matrix){room + l % 2 * TILE * this->widest, rows, width, width, 1};
        }
        outs[this->count - 1] = rows_from(this->out, first, rows);
        run_forth(this->layers, this->count, rows_from(this->x, first, rows), outs);
    }
}

/* The layers that policy and critic share, if there are any, and those of each. */
enum { TRUNK, POLICY, CRITIC, PARTS };

/* parts: the layers of a part are those from parts[part] to parts[part + 1]
 * outputs: how many the policy has
 * parameters: how many there are
 * partial: [pieces, parameters + 1], gradients and the sum of entropies of each piece
 * The others are where in a thread's room something is: `kept` what comes out of each layer.
 */
typedef struct {
    Work work;
    Matrix x;
    Layer layers[MAX_LAYERS];
    Loss loss;
    size parts[PARTS + 1], outputs, parameters;
    float *partial;
    size kept[MAX_LAYERS], columns, dfeatures, dz, between[2], sums;
} Gradient;

FAST static void go_gradient(const Work *work, size piece, size begin, size end, float *room)
{
    const Gradient *this = (const Gradient *)work;
    const Layer *layers = this->layers, *last = layers + this->parts[PARTS] - 1;
    const size *parts = this->parts;
    float *gradients = this->partial + piece * (this->parameters + 1), *column = room + this->columns;
    float *dz = room + this->dz, *between[2] = {room + this->between[0], room + this->between[1]};
    size outputs = this->outputs, action = this->loss.action.columns;
    Columns at = {.outputs = column, .doutputs = column + outputs * TILE, .entropies = column + 2 * outputs * TILE};
    at.action = column += 3 * outputs * TILE;
    at.value = column += action * TILE;
    at.dvalue = column += TILE;
    at.log_prob = column += TILE;
    at.entropy = column += TILE;
    at.dlog_prob = column += TILE;
    Matrix outs[MAX_LAYERS];
    for (size l = 0; l < parts[PARTS]; l++)
        outs[l] = (Matrix){room + this->kept[l], TILE, layers[l].out, layers[l].out, 1};
    outs[parts[CRITIC] - 1] = (Matrix){at.outputs, TILE, outputs, 1, TILE};
    outs[last - layers] = (Matrix){at.value, TILE, 1, 1, TILE};
    memset(gradients, 0, sizeof(float) * (this->parameters + 1));
    memset(dz, 0, sizeof(float) * (this->between[0] - this->dz)); /* what pads it is multiplied, too, and forgotten */
    for (size first = begin; first < end; first += TILE) {
        size rows = least(TILE, end - first);
        Matrix x = rows_from(this->x, first, rows), features = run_forth(layers, parts[POLICY], x, outs), dfeatures = {0};
        if (parts[POLICY])
            dfeatures = (Matrix){room + this->dfeatures, rows, features.columns, features.columns, 1};
        for (int part = POLICY; part <= CRITIC; part++)
            run_forth(layers + parts[part], parts[part + 1] - parts[part], features, outs + parts[part]);
        gradients[this->parameters] += lose(&this->loss, &at, outputs, first, rows, gradients);
        for (int part = POLICY; part <= CRITIC; part++) {
            Matrix dy = {part == POLICY ? at.doutputs : at.dvalue, rows, part == POLICY ? outputs : 1, 1, TILE};
            run_back(layers + parts[part], parts[part + 1] - parts[part], features, outs + parts[part], dy, dfeatures,
                     part == CRITIC, gradients, dz, between, room + this->sums);
        }
        run_back(layers, parts[POLICY], x, outs, dfeatures, (Matrix){0}, 0, gradients, dz, between, room + this->sums);
    }
}

/* The gradients of all pieces together, in their order, into `gradient`; then the mean entropy, and the norm. */
FAST static void gather(const Gradient *this, float *gradient, float *figures)
{
    size stride = this->parameters + 1;
    for (size piece = 1; piece < this->work.pieces; piece++) {
        float *sum = this->partial, *from = this->partial + piece * stride;
        for (size i = 0; i < stride; i++)
            sum[i] += from[i];
    }
    memcpy(gradient, this->partial, sizeof(float) * this->parameters);
    vec squares = spread(0);
    size i = 0;
    for (; i + LANE <= this->parameters; i += LANE)
        squares += load(gradient + i) * load(gradient + i);
    float square = total(squares);
    for (; i < this->parameters; i++)
        square += gradient[i] * gradient[i];
    figures[0] = this->partial[this->parameters] * this->loss.each;
    figures[1] = sqrtf(square);
}

/* As a minibatch normalises its advantages: mean 0, deviation 1. */
static void normalize(const float *from, size count, float *to)
{
    double mean = 0, square = 0;
    for (size i = 0; i < count; i++)
        mean += from[i];
    mean /= (double)count;
    for (size i = 0; i < count; i++)
        square += (from[i] - mean) * (from[i] - mean);
    float middle = (float)mean, scale = (float)(1 / (sqrt(square / (double)(count - 1)) + 1e-8));
    for (size i = 0; i < count; i++)
        to[i] = (from[i] - middle) * scale;
}

/* --- the way from and to Python --- */

enum { MAX_BUFFERS = 2 * MAX_LAYERS + 2 };

typedef struct {
    Py_buffer views[MAX_BUFFERS];
    size count;
} Borrowed;

static void give_back(Borrowed *borrowed)
{
    while (borrowed->count)
        PyBuffer_Release(&borrowed->views[--borrowed->count]);
}

static int refuse(const char *message)
{
    PyErr_SetString(PyExc_ValueError, message);
    return -1;
}

enum { STRIDED = 1, WRITABLE = 2, INT32 = 4, BOOL = 8 };

/* The numbers of an array with one or two axes, float32 unless `how` says otherwise; -1 and an exception if it is none.
 * A `rows` or `columns` that is not negative must be met; unless it may be STRIDED the numbers must be side by side. */
static int borrow(Borrowed *borrowed, PyObject *array, const char *name, int axes, size rows, size columns, int how,
                  Matrix *matrix)
{
    Py_buffer *view = &borrowed->views[borrowed->count];
    const char *format = how & INT32 ? "i" : how & BOOL ? "?" : "f";
    size each = how & BOOL ? 1 : 4;
    int flags = how & STRIDED ? PyBUF_STRIDES : PyBUF_C_CONTIGUOUS;
    if (PyObject_GetBuffer(array, view, PyBUF_FORMAT | flags | (how & WRITABLE ? PyBUF_WRITABLE : 0)) < 0)
        return -1;
    borrowed->count++;
    if (view->itemsize != each || !view->format || strcmp(view->format, format)) {
        PyErr_Format(PyExc_TypeError, "%s must hold %s, got format '%s'", name,
                     how & INT32 ? "int32" : how & BOOL ? "bool" : "float32", view->format ? view->format : "B");
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
    if (row % each || column % each) {
        PyErr_Format(PyExc_ValueError, "%s has strides that are no multiple of %zd bytes", name, each);
        return -1;
    }
    *matrix = (Matrix){view->buf, of_rows, of_columns, row / each, column / each};
    return 0;
}

/* An array [count] of numbers side by side. */
static int borrow_numbers(Borrowed *borrowed, PyObject *array, const char *name, size count, int how, float **at)
{
    Matrix matrix;
    if (borrow(borrowed, array, name, 1, -1, count, how, &matrix) < 0)
        return -1;
    *at = matrix.at;
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

/* Rooms for threads, then `shared` numbers for all; NULL and an exception where there is no memory. */
static float *make_room(Work *work, int threads, size shared)
{
    size rooms = least(threads, work->pieces) * work->room_each;
    work->room = aligned_alloc(64, (sizeof(float) * (size_t)(rooms + shared) + 63) / 64 * 64);
    if (!work->room)
        return (float *)PyErr_NoMemory();
    return work->room + rooms;
}

static int check_threads(int threads)
{
    if (threads >= 1 && threads <= MAX_THREADS)
        return 0;
    PyErr_Format(PyExc_ValueError, "threads must be 1 to %d, got %d", MAX_THREADS, threads);
    return -1;
}

/* What both functions end with: None, or NULL where there was an exception. */
static PyObject *finish(Work *work, Borrowed *borrowed)
{
    free(work->room);
    give_back(borrowed);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* The layers of `forward`, of arrays. */
static int borrow_layers(Borrowed *borrowed, Forward *this, PyObject *weights, PyObject *biases, PyObject *activations)
{
    if (count_items(weights, "weights", -1) < 0)
        return -1;
    size count = PyTuple_Size(weights), columns = this->x.columns, length;
    char *codes;
    if (count < 1 || count > MAX_LAYERS) {
        PyErr_Format(PyExc_ValueError, "a perceptron has 1 to %d layers here, got %zd", MAX_LAYERS, count);
        return -1;
    }
    if (PyBytes_AsStringAndSize(activations, &codes, &length) < 0 ||
        count_items(biases, "biases", count) < 0)
        return -1;
    if (length != count) {
        PyErr_Format(PyExc_ValueError, "%zd activations for %zd layers", length, count);
        return -1;
    }
    this->count = count;
    for (size l = 0; l < count; l++) {
        Matrix weight;
        float *bias;
        if (codes[l] < 0 || codes[l] >= ACTIVATIONS) {
            PyErr_Format(PyExc_ValueError, "there is no activation %d", codes[l]);
            return -1;
        }
        if (borrow(borrowed, PyTuple_GetItem(weights, l), "weight", 2, columns, -1, 0, &weight) < 0 ||
            borrow_numbers(borrowed, PyTuple_GetItem(biases, l), "bias", weight.columns, 0, &bias) < 0)
            return -1;
        columns = weight.columns;
        this->layers[l] =
            (Layer){.in = weight.rows, .out = columns, .activation = codes[l], .weight = weight.at, .bias = bias};
    }
    return 0;
}

PyDoc_STRVAR(forward_doc, "forward(x, weights, biases, activations, out, threads)\n\n"
                          "Write what the layers say of x [N, in] into out [N, out].");

static PyObject *forward(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *x, *weights, *biases, *activations, *out;
    int threads;
    if (!PyArg_ParseTuple(args, "OOOOOi", &x, &weights, &biases, &activations, &out, &threads) ||
        check_threads(threads) < 0)
        return NULL;
    Borrowed borrowed = {.count = 0};
    Forward this = {.work.go = go_forward};
    Work *work = &this.work;
    size panels = 0, parameters = 0;
    if (borrow(&borrowed, x, "x", 2, -1, -1, STRIDED, &this.x) < 0 ||
        borrow_layers(&borrowed, &this, weights, biases, activations) < 0 ||
        borrow(&borrowed, out, "out", 2, this.x.rows, this.layers[this.count - 1].out, WRITABLE, &this.out) < 0)
        return finish(work, &borrowed);
    for (Layer *layer = this.layers; layer < this.layers + this.count; layer++) {
        if (layer->out > this.widest)
            this.widest = layer->out;
        panels += forth_numbers(layer);
        parameters += (layer->in + 1) * layer->out;
    }
    cut(work, this.x.rows, ROWS, PIECES);
    work->cost = this.x.rows * parameters;
    work->room_each = 2 * TILE * this.widest;
    float *to = make_room(work, threads, panels);
    if (!to)
        return finish(work, &borrowed);
    Py_BEGIN_ALLOW_THREADS;
    for (size l = 0; l < this.count; l++)
        to = pack_forth(&this.layers[l], to);
    do_work(work, threads);
    Py_END_ALLOW_THREADS;
    return finish(work, &borrowed);
}

/* The layers of `ppo_gradient`, of a table: part, in, out, activation, and where weight and bias are among the
 * parameters. */
static int read_layers(Gradient *this, const Matrix *table, const float *parameters)
{
    if (table->rows > MAX_LAYERS)
        return refuse("there are too many layers");
    size part = TRUNK, before = this->x.columns, features = this->x.columns;
    for (size l = 0; l < table->rows; l++) {
        const int32_t *of = (const int32_t *)table->at + l * 6;
        for (; part < of[0] && part < CRITIC; before = features)
            this->parts[++part] = l;
        if (part != of[0] || of[1] != before || of[2] < 1 || of[3] < 0 || of[3] >= ACTIVATIONS)
            return refuse("layers do not follow each other");
        size weight = of[4], bias = of[5], numbers = (size)of[1] * of[2];
        if (weight < 0 || bias < 0 || weight + numbers > this->parameters || bias + of[2] > this->parameters)
            return refuse("layers lie outside of the parameters");
        this->layers[l] = (Layer){of[1], of[2], of[3], parameters + weight, parameters + bias, NULL, NULL, weight, bias};
        before = of[2];
        if (part == TRUNK)
            features = before;
    }
    this->parts[PARTS] = table->rows;
    if (part != CRITIC || this->parts[POLICY] == this->parts[CRITIC] || before != 1)
        return refuse("there must be layers of a policy and of a critic with one value");
    const Layer *policy = &this->layers[this->parts[CRITIC] - 1], *critic = &this->layers[table->rows - 1];
    if (policy->activation != IDENTITY || critic->activation != IDENTITY)
        return refuse("the last layers of policy and critic have no activation");
    this->outputs = policy->out;
    return 0;
}

/* The parts of an action, copied to `to`, must fit the arrays, and cover what the policy says. */
static int read_blocks(Gradient *this, const Matrix *table, float log_half, void *to)
{
    Loss *loss = &this->loss;
    size covered = 0;
    loss->blocks = memcpy(to, table->at, sizeof(Block) * table->rows);
    loss->count = table->rows;
    loss->log_prob_start = -log_half;
    loss->entropy_start = log_half;
    for (const Block *block = loss->blocks; block < loss->blocks + loss->count; block++) {
        if (block->kind < 0 || block->kind >= KINDS || block->groups < 1 || block->choices < 1 || block->column < 0 ||
            block->column + (size)block->groups > loss->action.columns || block->output != covered)
            return refuse("blocks do not fit the action");
        size width = (size)block->groups * block->choices, end = block->extra + width;
        covered += width;
        if (block->kind == CHOICE ? block->extra < -1 || (block->extra >= 0 && end > loss->masks)
                                  : block->extra < 0 || block->choices != 1 || end > this->parameters)
            return refuse("blocks do not fit the masks or the deviations");
        for (size a = 0; block->kind != CHOICE && a < block->groups; a++) {
            float log_std = loss->parameters[block->extra + a];
            loss->log_prob_start -= log_std + 0.5f * LOG_2_PI;
            loss->entropy_start += log_std + 0.5f * (1 + LOG_2_PI);
        }
    }
    return covered == this->outputs ? 0 : refuse("blocks do not cover what the policy says");
}

/* Where in a thread's room each thing is, and how many numbers all threads share: panels and gradients of pieces. */
static size lay_out(Gradient *this)
{
    size widest = this->outputs, panels = 0, at = 0, pieces = PIECES, first = this->parts[POLICY];
    for (size l = 0; l < this->parts[PARTS]; l++) {
        const Layer *layer = &this->layers[l];
        if (layer->out > widest)
            widest = layer->out;
        this->kept[l] = at;
        at += TILE * layer->out;
        panels += forth_numbers(layer) + back_numbers(layer);
    }
    size features = first ? this->layers[first - 1].out : 0;
    this->columns = at;
    this->dfeatures = at += (3 * this->outputs + this->loss.action.columns + 5) * TILE;
    this->dz = at += TILE * features;
    this->between[0] = at += TILE * padded(widest);
    this->between[1] = at += TILE * widest;
    this->sums = at += TILE * widest;
    this->work.room_each = at + padded(widest);
    while (pieces > 1 && pieces * this->parameters > MAX_PARTIAL)
        pieces /= 2;
    cut(&this->work, this->x.rows, ROWS, pieces);
    this->work.cost = 3 * this->x.rows * this->parameters;
    return panels + this->work.pieces * (this->parameters + 1);
}

PyDoc_STRVAR(ppo_gradient_doc,
             "ppo_gradient(parameters, gradient, layers, blocks, quadrature, rows, outs, numbers, threads)\n\n"
             "Write the gradient of the loss on N rows; see rustyrl_learner/compiled.py for what is what.");

static PyObject *ppo_gradient(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *parameters, *gradient, *layers, *blocks, *quadrature;
    PyObject *x, *action, *masks, *proximal, *importance, *advantage, *old_value, *target;
    PyObject *normalized, *log_prob, *value, *figures;
    float entropy, value_coefficient, log_half;
    int threads;
    Borrowed borrowed = {.count = 0};
    Gradient this = {.work.go = go_gradient};
    Work *work = &this.work;
    Loss *loss = &this.loss;
    if (!PyArg_ParseTuple(args, "OOOOO(OOOOOOOO)(OOOO)(fffff)i", &parameters, &gradient, &layers, &blocks, &quadrature,
                          &x, &action, &masks, &proximal, &importance, &advantage, &old_value, &target, &normalized,
                          &log_prob, &value, &figures, &loss->clip, &loss->value_clip, &entropy, &value_coefficient,
                          &log_half, &threads) ||
        check_threads(threads) < 0)
        return NULL;
    Matrix at, of_layers, of_blocks, of_masks = {0}, points;
    float *given[5], *into, *found, *normal = NULL;
    PyObject *columns[] = {proximal, importance, advantage, old_value, target};
    if (borrow(&borrowed, x, "observation", 2, -1, -1, STRIDED, &this.x) < 0)
        return finish(work, &borrowed);
    size rows = this.x.rows;
    if (borrow(&borrowed, parameters, "parameters", 1, -1, -1, 0, &at) < 0 ||
        borrow_numbers(&borrowed, gradient, "gradient", at.columns, WRITABLE, &into) < 0 ||
        borrow(&borrowed, layers, "layers", 2, -1, 6, INT32, &of_layers) < 0 ||
        borrow(&borrowed, blocks, "blocks", 2, -1, 6, INT32, &of_blocks) < 0 ||
        borrow(&borrowed, quadrature, "quadrature", 2, 2, -1, 0, &points) < 0 ||
        borrow(&borrowed, action, "action", 2, rows, -1, STRIDED, &loss->action) < 0 ||
        (masks != Py_None && borrow(&borrowed, masks, "action_mask", 2, rows, -1, BOOL, &of_masks) < 0) ||
        borrow_numbers(&borrowed, log_prob, "log_prob", rows, WRITABLE, &loss->log_prob) < 0 ||
        borrow_numbers(&borrowed, value, "value", rows, WRITABLE, &loss->value) < 0 ||
        borrow_numbers(&borrowed, figures, "figures", 2, WRITABLE, &found) < 0)
        return finish(work, &borrowed);
    for (int i = 0; i < 5; i++)
        if (borrow_numbers(&borrowed, columns[i], "an array of rows", rows, 0, &given[i]) < 0)
            return finish(work, &borrowed);
    if (normalized != Py_None &&
        borrow_numbers(&borrowed, normalized, "normalized advantage", rows, WRITABLE, &normal) < 0)
        return finish(work, &borrowed);
    this.parameters = at.columns;
    loss->parameters = at.at;
    loss->nodes = points.at;
    loss->weights = points.at + points.columns;
    loss->points = points.columns;
    loss->mask = (const unsigned char *)of_masks.at;
    loss->masks = of_masks.columns;
    loss->proximal = given[0];
    loss->importance = given[1];
    loss->advantage = normal ? normal : given[2];
    loss->old_value = given[3];
    loss->target = given[4];
    loss->each = rows ? 1 / (float)rows : 0;
    loss->dentropy = -entropy * loss->each;
    loss->dvalue = value_coefficient * loss->each;
    if (read_layers(&this, &of_layers, at.at) < 0)
        return finish(work, &borrowed);
    size shared = lay_out(&this);
    float *to = make_room(work, threads, shared + padded(of_blocks.rows * 6));
    if (!to || read_blocks(&this, &of_blocks, log_half, to + shared) < 0)
        return finish(work, &borrowed);
    Py_BEGIN_ALLOW_THREADS;
    if (normal)
        normalize(given[2], rows, normal);
    for (size l = 0; l < this.parts[PARTS]; l++) {
        to = pack_forth(&this.layers[l], to);
        if (l && (l != this.parts[CRITIC] || this.parts[POLICY]))
            to = pack_back(&this.layers[l], to);
    }
    this.partial = to;
    do_work(work, threads);
    gather(&this, into, found);
    Py_END_ALLOW_THREADS;
    return finish(work, &borrowed);
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
    {"ppo_gradient", ppo_gradient, METH_VARARGS, ppo_gradient_doc},
    {"supported", supported, METH_NOARGS, supported_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_perceptron", "Perceptrons, compiled; see rustyrl/perceptron.py.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__perceptron(void)
{
    static int registered;
    if (!registered && pthread_atfork(NULL, NULL, forget_threads))
        return PyErr_NoMemory();
    registered = 1;
    return PyModuleDef_Init(&definition);
}
