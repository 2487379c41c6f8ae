/* Small perceptrons on a CPU: what an actor's policy says, and a learner's optimiser steps, one minibatch after the other.
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
#include "adam.h"

enum { MAX_LAYERS = 64, MAX_PARTIAL = 1 << 23 }; /* numbers in gradients of pieces */
enum { MIN_SLICE = 1024, SUM_COST = 8, STEP_COST = 128 }; /* parameters; what a sum, and a step, takes, in products */

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
 * most: pieces of a minibatch
 * panels: where the layers' weights are brought to
 * partial: [pieces, parameters + SUMS], gradients and sums of each piece
 * The others are where in a thread's room something is, which begins with what goes in: `kept` what comes out of each layer.
 */
typedef struct {
    Work work;
    Matrix x;
    Layer layers[MAX_LAYERS];
    Loss loss;
    size parts[PARTS + 1], outputs, parameters, most;
    float *panels, *partial;
    size kept[MAX_LAYERS], columns, dfeatures, dz, between[2], sums;
} Gradient;

/* Rows of a matrix, side by side. */
static Matrix collect(Matrix from, const int32_t *order, size rows, float *to)
{
    Matrix tile = {to, rows, from.columns, from.columns, 1};
    for (size r = 0; r < rows; r++, to += from.columns) {
        const float *row = from.at + order[r] * from.row;
        if (from.column == 1)
            memcpy(to, row, sizeof(float) * from.columns);
        else
            for (size i = 0; i < from.columns; i++)
                to[i] = row[i * from.column];
    }
    return tile;
}

FAST static void go_gradient(const Work *work, size piece, size begin, size end, float *room)
{
    const Gradient *this = (const Gradient *)work;
    const Layer *layers = this->layers, *last = layers + this->parts[PARTS] - 1;
    const size *parts = this->parts;
    float *gradients = this->partial + piece * (this->parameters + SUMS), *column = room + this->columns;
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
    memset(gradients, 0, sizeof(float) * (this->parameters + SUMS));
    memset(dz, 0, sizeof(float) * (this->between[0] - this->dz)); /* what pads it is multiplied, too, and forgotten */
    for (size first = begin; first < end; first += TILE) {
        size rows = least(TILE, end - first);
        Matrix x = collect(this->x, this->loss.order + first, rows, room);
        Matrix features = run_forth(layers, parts[POLICY], x, outs), dfeatures = {0};
        if (parts[POLICY])
            dfeatures = (Matrix){room + this->dfeatures, rows, features.columns, features.columns, 1};
        for (int part = POLICY; part <= CRITIC; part++)
            run_forth(layers + parts[part], parts[part + 1] - parts[part], features, outs + parts[part]);
        lose(&this->loss, &at, outputs, first, rows, gradients, gradients + this->parameters);
        for (int part = POLICY; part <= CRITIC; part++) {
            Matrix dy = {part == POLICY ? at.doutputs : at.dvalue, rows, part == POLICY ? outputs : 1, 1, TILE};
            run_back(layers + parts[part], parts[part + 1] - parts[part], features, outs + parts[part], dy, dfeatures,
                     part == CRITIC, gradients, dz, between, room + this->sums);
        }
        run_back(layers, parts[POLICY], x, outs, dfeatures, (Matrix){0}, 0, gradients, dz, between, room + this->sums);
    }
}

/* Parameters by the slice, which threads take as they do rows.
 *
 * pieces, stride: of `partial`, whose numbers are added up into the first piece's
 * gradient: [parameters], a copy of it
 * squares: of the gradient, of each slice
 * adam, number, norm: the step along it
 */
typedef struct {
    Work work;
    float *partial, *gradient, *values, squares[PIECES];
    size pieces, stride, number;
    const Adam *adam;
    float norm;
} Slices;

static void cut_slices(Slices *slices, size parameters, size cost, void (*go)(const Work *, size, size, size, float *))
{
    slices->work = (Work){.go = go, .cost = parameters * cost, .soon = 1};
    cut(&slices->work, parameters, LANE, MIN_SLICE, PIECES);
}

/* The gradients of all pieces together, in their order. */
FAST static void go_gather(const Work *work, size slice, size begin, size end, float *Py_UNUSED(room))
{
    Slices *this = (Slices *)work;
    float *sum = this->partial;
    for (size piece = 1; piece < this->pieces; piece++) {
        const float *from = sum + piece * this->stride;
        for (size i = begin; i < end; i++)
            sum[i] += from[i];
    }
    memcpy(this->gradient + begin, sum + begin, sizeof(float) * (size_t)(end - begin));
    vec squares = spread(0);
    size i = begin;
    for (; i + LANE <= end; i += LANE)
        squares += load(sum + i) * load(sum + i);
    float square = total(squares);
    for (; i < end; i++)
        square += sum[i] * sum[i];
    this->squares[slice] = square;
}

static void go_step(const Work *work, size Py_UNUSED(slice), size begin, size end, float *Py_UNUSED(room))
{
    const Slices *this = (const Slices *)work;
    step(this->adam, this->number, this->norm, this->gradient, begin, end, this->values);
}

/* The sum of all pieces' gradients, into `gradient`, and [FIGURES] of them. */
static void gather(const Gradient *this, float *gradient, float *figures, size threads)
{
    Slices slices = {.partial = this->partial, .gradient = gradient, .pieces = this->work.pieces};
    slices.stride = this->parameters + SUMS;
    cut_slices(&slices, this->parameters, slices.pieces * SUM_COST, go_gather);
    do_work(&slices.work, threads);
    float square = 0;
    for (size slice = 0; slice < slices.work.pieces; slice++)
        square += slices.squares[slice];
    for (size sum = this->parameters; sum < slices.stride; sum++) {
        for (size piece = 1; piece < slices.pieces; piece++)
            this->partial[sum] += this->partial[sum + piece * slices.stride];
        figures[sum - this->parameters] = this->partial[sum] * this->loss.each;
    }
    figures[NORM] = sqrtf(square);
}

/* As a minibatch normalises its advantages: mean 0, deviation 1. */
static void normalize(float *at, size count)
{
    double mean = 0, square = 0;
    for (size i = 0; i < count; i++)
        mean += at[i];
    mean /= (double)count;
    for (size i = 0; i < count; i++)
        square += (at[i] - mean) * (at[i] - mean);
    float middle = (float)mean, scale = (float)(1 / (sqrt(square / (double)(count - 1)) + 1e-8));
    for (size i = 0; i < count; i++)
        at[i] = (at[i] - middle) * scale;
}

/* What is the same for all minibatches.
 *
 * given: [N], the advantages as they came
 * advantage: [n], those of the rows in their order, normalised if that is asked for
 * gradient: [parameters], of the newest minibatch
 */
typedef struct {
    const float *given;
    float *advantage, *gradient;
    float entropy, value_coefficient, log_half;
    int normalized;
} Epoch;

/* The gradient of rows order[start] to order[stop - 1], and its figures. */
static void take_gradient(const Gradient *of_all, const Epoch *epoch, size start, size stop, float *figures, size threads)
{
    Gradient this = *of_all;
    size rows = stop - start;
    this.loss.order += start;
    this.loss.log_prob += start;
    this.loss.value += start;
    this.loss.advantage = epoch->advantage + start;
    this.loss.each = 1 / (float)rows;
    this.loss.dentropy = -epoch->entropy * this.loss.each;
    this.loss.dvalue = epoch->value_coefficient * this.loss.each;
    begin_loss(&this.loss, epoch->log_half);
    for (size r = 0; r < rows; r++)
        epoch->advantage[start + r] = epoch->given[this.loss.order[r]];
    if (epoch->normalized && rows > 1)
        normalize(epoch->advantage + start, rows);
    float *to = this.panels;
    for (size l = 0; l < this.parts[PARTS]; l++) {
        to = pack_forth(&this.layers[l], to);
        if (l && (l != this.parts[CRITIC] || this.parts[POLICY]))
            to = pack_back(&this.layers[l], to);
    }
    cut(&this.work, rows, ROWS, TILE, this.most);
    this.work.cost = 3 * rows * this.parameters;
    this.work.soon = 1;
    do_work(&this.work, threads);
    gather(&this, epoch->gradient, figures, threads);
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

/* Moments, rate, beta1, beta2, epsilon, decay, the largest norm of a gradient, what does not decay, steps before. */
static int borrow_adam(Borrowed *borrowed, Adam *adam, PyObject *given, size parameters)
{
    PyObject *first, *second;
    if (!PyArg_ParseTuple(given, "OOddddddnn", &first, &second, &adam->rate, &adam->beta1, &adam->beta2, &adam->epsilon,
                          &adam->decay, &adam->largest_norm, &adam->kept, &adam->steps) ||
        borrow_numbers(borrowed, first, "the first moments", parameters, WRITABLE, &adam->first) < 0 ||
        borrow_numbers(borrowed, second, "the second moments", parameters, WRITABLE, &adam->second) < 0)
        return -1;
    return adam->kept < 0 || adam->steps < 0 ? refuse("neither steps nor what does not decay can be negative") : 0;
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
    cut(work, this.x.rows, ROWS, 2 * TILE, PIECES);
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

/* The layers of `ppo_epoch`, of a table: part, in, out, activation, and where weight and bias are among the
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
static int read_blocks(Gradient *this, const Matrix *table, void *to)
{
    Loss *loss = &this->loss;
    size covered = 0;
    loss->blocks = memcpy(to, table->at, sizeof(Block) * table->rows);
    loss->count = table->rows;
    for (const Block *block = loss->blocks; block < loss->blocks + loss->count; block++) {
        if (block->kind < 0 || block->kind >= KINDS || block->groups < 1 || block->choices < 1 || block->column < 0 ||
            block->column + (size)block->groups > loss->action.columns || block->output != covered)
            return refuse("blocks do not fit the action");
        size width = (size)block->groups * block->choices, end = block->extra + width;
        covered += width;
        if (block->kind == CHOICE ? block->extra < -1 || (block->extra >= 0 && end > loss->masks)
                                  : block->extra < 0 || block->choices != 1 || end > this->parameters)
            return refuse("blocks do not fit the masks or the deviations");
    }
    return covered == this->outputs ? 0 : refuse("blocks do not cover what the policy says");
}

/* The order must be of rows that there are, and the edges of minibatches must rise within it. */
static int read_order(const Matrix *order, const Matrix *edges, size rows)
{
    const int32_t *row = (const int32_t *)order->at, *edge = (const int32_t *)edges->at;
    for (size i = 0; i < order->columns; i++)
        if (row[i] < 0 || row[i] >= rows)
            return refuse("the order names rows that there are not");
    if (edges->columns < 2 || edge[0] < 0 || edge[edges->columns - 1] > order->columns)
        return refuse("edges do not fit the order");
    for (size i = 1; i < edges->columns; i++)
        if (edge[i] <= edge[i - 1])
            return refuse("edges do not rise");
    return 0;
}

/* Where in a thread's room each thing is, and how many numbers all threads share: panels and gradients of pieces.
 * Returns how many of them are panels. */
static size lay_out(Gradient *this, const int32_t *edges, size minibatches)
{
    size widest = this->outputs, panels = 0, at = TILE * this->x.columns, pieces = 0, first = this->parts[POLICY];
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
    for (this->most = PIECES; this->most > 1 && this->most * this->parameters > MAX_PARTIAL;)
        this->most /= 2;
    for (size i = 0; i < minibatches; i++) {
        cut(&this->work, edges[i + 1] - edges[i], ROWS, TILE, this->most);
        pieces = this->work.pieces > pieces ? this->work.pieces : pieces;
    }
    this->work.pieces = pieces;
    return panels;
}

PyDoc_STRVAR(ppo_epoch_doc,
             "ppo_epoch(parameters, gradient, layers, blocks, quadrature, rows, order, edges, outs, numbers, adam, "
             "threads) -> int\n\n"
             "Take an optimiser step for each minibatch of N rows; see rustyrl_learner/compiled.py for what is what.");

static PyObject *ppo_epoch(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *parameters, *gradient, *layers, *blocks, *quadrature, *order, *edges, *moments;
    PyObject *x, *action, *masks, *proximal, *importance, *advantage, *old_value, *target;
    PyObject *advantages, *log_prob, *value, *figures;
    int threads;
    Borrowed borrowed = {.count = 0};
    Gradient this = {.work.go = go_gradient};
    Epoch epoch = {0};
    Adam adam = {0};
    Work *work = &this.work;
    Loss *loss = &this.loss;
    if (!PyArg_ParseTuple(args, "OOOOO(OOOOOOOO)OO(OOOO)(fffffp)Oi", &parameters, &gradient, &layers, &blocks, &quadrature,
                          &x, &action, &masks, &proximal, &importance, &advantage, &old_value, &target, &order, &edges,
                          &advantages, &log_prob, &value, &figures, &loss->clip, &loss->value_clip, &epoch.entropy,
                          &epoch.value_coefficient, &epoch.log_half, &epoch.normalized, &moments, &threads) ||
        check_threads(threads) < 0)
        return NULL;
    Matrix at, of_layers, of_blocks, of_masks = {0}, points, of_order, of_edges, of_figures;
    float *given[5];
    PyObject *columns[] = {proximal, importance, advantage, old_value, target};
    if (borrow(&borrowed, x, "observation", 2, -1, -1, STRIDED, &this.x) < 0)
        return finish(work, &borrowed);
    size rows = this.x.rows;
    if (borrow(&borrowed, parameters, "parameters", 1, -1, -1, WRITABLE, &at) < 0 ||
        borrow_numbers(&borrowed, gradient, "gradient", at.columns, WRITABLE, &epoch.gradient) < 0 ||
        borrow(&borrowed, layers, "layers", 2, -1, 6, INT32, &of_layers) < 0 ||
        borrow(&borrowed, blocks, "blocks", 2, -1, 6, INT32, &of_blocks) < 0 ||
        borrow(&borrowed, quadrature, "quadrature", 2, 2, -1, 0, &points) < 0 ||
        borrow(&borrowed, action, "action", 2, rows, -1, STRIDED, &loss->action) < 0 ||
        (masks != Py_None && borrow(&borrowed, masks, "action_mask", 2, rows, -1, BOOL, &of_masks) < 0) ||
        borrow(&borrowed, order, "order", 1, -1, -1, INT32, &of_order) < 0 ||
        borrow(&borrowed, edges, "edges", 1, -1, -1, INT32, &of_edges) < 0 ||
        read_order(&of_order, &of_edges, rows) < 0 ||
        borrow_numbers(&borrowed, advantages, "advantages", of_order.columns, WRITABLE, &epoch.advantage) < 0 ||
        borrow_numbers(&borrowed, log_prob, "log_prob", of_order.columns, WRITABLE, &loss->log_prob) < 0 ||
        borrow_numbers(&borrowed, value, "value", of_order.columns, WRITABLE, &loss->value) < 0 ||
        borrow(&borrowed, figures, "figures", 2, of_edges.columns - 1, FIGURES, WRITABLE, &of_figures) < 0)
        return finish(work, &borrowed);
    for (int i = 0; i < 5; i++)
        if (borrow_numbers(&borrowed, columns[i], "an array of rows", rows, 0, &given[i]) < 0)
            return finish(work, &borrowed);
    if (moments != Py_None && borrow_adam(&borrowed, &adam, moments, at.columns) < 0)
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
    epoch.given = given[2];
    loss->order = (const int32_t *)of_order.at;
    loss->old_value = given[3];
    loss->target = given[4];
    if (read_layers(&this, &of_layers, at.at) < 0)
        return finish(work, &borrowed);
    const int32_t *edge = (const int32_t *)of_edges.at;
    size minibatches = of_edges.columns - 1, panels = lay_out(&this, edge, minibatches), taken = 0;
    size shared = panels + work->pieces * (this.parameters + SUMS);
    this.panels = make_room(work, threads, shared + padded(of_blocks.rows * 6));
    if (!this.panels || read_blocks(&this, &of_blocks, this.panels + shared) < 0)
        return finish(work, &borrowed);
    this.partial = this.panels + panels;
    Slices slices = {.gradient = epoch.gradient, .values = at.at, .adam = &adam};
    cut_slices(&slices, this.parameters, STEP_COST, go_step);
    Py_BEGIN_ALLOW_THREADS;
    begin_works();
    for (; taken < minibatches; taken++) {
        float *found = of_figures.at + FIGURES * taken;
        take_gradient(&this, &epoch, edge[taken], edge[taken + 1], found, threads);
        if (!isfinite(found[NORM]))
            break;
        if (adam.first) {
            slices.number = taken + 1;
            slices.norm = found[NORM];
            slices.work.next = slices.work.threads = 0;
            do_work(&slices.work, threads);
        }
    }
    end_works();
    Py_END_ALLOW_THREADS;
    PyObject *none = finish(work, &borrowed);
    Py_XDECREF(none);
    return none ? PyLong_FromSsize_t(taken) : NULL;
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
    {"ppo_epoch", ppo_epoch, METH_VARARGS, ppo_epoch_doc},
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
