/* Small perceptrons on a CPU: what an actor's policy says, and a learner's optimiser steps, one minibatch after the other.
 *
 * A tile of rows goes through everything before the next: policy.h and epoch.h, and what they share, layers.h and loss.h.
 * Tiles make pieces, which threads take: threads.h. Arithmetic is in a fixed order: the same numbers give the same bits on
 * the same machine, with however many threads. Here is the way from and to Python.
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

enum { MAX_LAYERS = 64 };

#include "policy.h"
#include "epoch.h"
#include "arrays.h"

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

/* What functions end with: None, or NULL where there was an exception. */
static PyObject *finish(Work *work, Borrowed *borrowed)
{
    free(work->room);
    give_back(borrowed);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* The layers of a pass, of arrays. */
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
        if (columns > this->widest)
            this->widest = columns;
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

/* Rooms of so many numbers for threads, panels, and `shared` numbers for all; where these are, or NULL and an exception. */
static float *prepare_forward(Forward *this, size room_each, int threads, size shared)
{
    size panels = 0, parameters = 0;
    for (const Layer *layer = this->layers; layer < this->layers + this->count; layer++) {
        panels += forth_numbers(layer);
        parameters += (layer->in + 1) * layer->out;
    }
    cut(&this->work, this->x.rows, ROWS, 2 * TILE, PIECES);
    this->work.cost = this->x.rows * parameters;
    this->work.room_each = room_each;
    this->panels = make_room(&this->work, threads, panels + shared);
    return this->panels ? this->panels + panels : NULL;
}

static void run_forward(Forward *this, int threads)
{
    Py_BEGIN_ALLOW_THREADS;
    float *to = this->panels;
    for (size l = 0; l < this->count; l++)
        to = pack_forth(&this->layers[l], to);
    do_work(&this->work, threads);
    Py_END_ALLOW_THREADS;
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
    if (borrow(&borrowed, x, "x", 2, -1, -1, STRIDED, &this.x) < 0 ||
        borrow_layers(&borrowed, &this, weights, biases, activations) < 0 ||
        borrow(&borrowed, out, "out", 2, this.x.rows, this.layers[this.count - 1].out, WRITABLE, &this.out) < 0)
        return finish(&this.work, &borrowed);
    if (prepare_forward(&this, 2 * TILE * this.widest, threads, 0))
        run_forward(&this, threads);
    return finish(&this.work, &borrowed);
}

/* The parts of an action, copied to `to`, must fit the arrays, and cover what the policy says.
 * Those that are boxes have their deviations among so many numbers at `parameters`. */
static int read_blocks(Loss *loss, size outputs, size parameters, const Matrix *table, void *to)
{
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
                                  : block->extra < 0 || block->choices != 1 || end > parameters)
            return refuse("blocks do not fit the masks or the deviations");
    }
    return covered == outputs ? 0 : refuse("blocks do not cover what the policy says");
}

/* Mean, scale and limit of observations. */
static int borrow_normalizer(Borrowed *borrowed, Policy *this, PyObject *given)
{
    PyObject *mean, *scale;
    size in = this->forward.x.columns;
    return PyArg_ParseTuple(given, "OOf", &mean, &scale, &this->limit) &&
                   borrow_numbers(borrowed, mean, "the normaliser's mean", in, 0, &this->mean) == 0 &&
                   borrow_numbers(borrowed, scale, "the normaliser's scale", in, 0, &this->scale) == 0
               ? 0
               : -1;
}

PyDoc_STRVAR(policy_doc,
             "policy(x, normalizer, weights, biases, activations, blocks, log_std, log_half, masks, noise, action, log_prob, "
             "threads)\n\n"
             "Write the log-probability [N] of each raw action [N, A] under a policy whose layers see x [N, in].\n\n"
             "normalizer: mean [in], scale [in] and limit of observations, or None\n"
             "blocks: [n, 6] int32, of `rustyrl.perceptron.encode_blocks`\n"
             "log_std: [boxes], the logarithms of their deviations\n"
             "log_half: of the half widths of squashed boxes, summed\n"
             "masks: [N, M] bool, or None\n"
             "noise: [N, A], of which actions are drawn and written: standard normal for a box and uniform for a choice; "
             "None for actions that are given");

static PyObject *policy(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *x, *normalizer, *weights, *biases, *activations, *blocks, *log_std, *masks, *noise, *action, *log_prob;
    float log_half;
    int threads;
    if (!PyArg_ParseTuple(args, "OOOOOOOfOOOOi", &x, &normalizer, &weights, &biases, &activations, &blocks, &log_std,
                          &log_half, &masks, &noise, &action, &log_prob, &threads) ||
        check_threads(threads) < 0)
        return NULL;
    Borrowed borrowed = {.count = 0};
    Policy this = {.forward.work.go = go_policy};
    Forward *forward = &this.forward;
    Loss *loss = &this.loss;
    Matrix of_blocks, of_log_std, of_masks = {0};
    if (borrow(&borrowed, x, "x", 2, -1, -1, STRIDED, &forward->x) < 0 ||
        borrow_layers(&borrowed, forward, weights, biases, activations) < 0 ||
        borrow(&borrowed, blocks, "blocks", 2, -1, 6, INT32, &of_blocks) < 0 ||
        borrow(&borrowed, log_std, "log_std", 1, -1, -1, 0, &of_log_std) < 0)
        return finish(&forward->work, &borrowed);
    size rows = forward->x.rows;
    if ((normalizer != Py_None && borrow_normalizer(&borrowed, &this, normalizer) < 0) ||
        (masks != Py_None && borrow(&borrowed, masks, "masks", 2, rows, -1, BOOL, &of_masks) < 0) ||
        borrow(&borrowed, action, "action", 2, rows, -1, STRIDED | (noise == Py_None ? 0 : WRITABLE), &loss->action) < 0 ||
        (noise != Py_None &&
         borrow(&borrowed, noise, "noise", 2, rows, loss->action.columns, STRIDED, &this.noise) < 0) ||
        borrow_numbers(&borrowed, log_prob, "log_prob", rows, WRITABLE, &loss->log_prob) < 0)
        return finish(&forward->work, &borrowed);
    if (rows > INT32_MAX) {
        refuse("there are too many rows");
        return finish(&forward->work, &borrowed);
    }
    loss->parameters = of_log_std.at;
    loss->mask = (const unsigned char *)of_masks.at;
    loss->masks = of_masks.columns;
    float *shared = prepare_forward(forward, policy_room(&this), threads, padded(of_blocks.rows * 6));
    size outputs = forward->layers[forward->count - 1].out;
    if (shared && read_blocks(loss, outputs, of_log_std.columns, &of_blocks, shared) == 0) {
        begin_loss(loss, log_half);
        run_forward(forward, threads);
    }
    return finish(&forward->work, &borrowed);
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
        if (layer->activation == SILU) {
            this->slopes[l] = at;
            at += TILE * layer->out;
        }
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
    if (!this.panels || read_blocks(loss, this.outputs, this.parameters, &of_blocks, this.panels + shared) < 0)
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
    {"policy", policy, METH_VARARGS, policy_doc},
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
