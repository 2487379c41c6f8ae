/* Work that is cut into pieces of rows, which threads take as they are free, so that a core that is busy elsewhere holds
 * nobody up. What a piece comes to must not depend on who takes it. */

enum { MAX_THREADS = 64, PIECES = 16 };
enum { WORTH_WAKING = 1 << 22 }; /* products: a tenth of a millisecond of them; to wake somebody up takes a part of it */
enum { WORTH_SHARING = 1 << 21 }; /* with who looks out for them: less saves a tenth of the time for twice the processor's */
enum { PATIENCE = 20000 }; /* a fraction of a millisecond: to sleep for the rest of a piece takes longer than it */
enum { LOSSES = 4 }; /* of works that others took, after which who looks out is one too many */
enum { TRIES = 200 }; /* for a lock that is held for some nanoseconds, and that takes a microsecond to wait for */

/* rows, rows_each: of all, and of a piece; they may be any things that are side by side
 * cost: products of all
 * soon: whether more of it follows, so that who helps stays awake
 * room, room_each: numbers that each thread has for itself
 * next, threads: the piece to be taken next, and how many threads have taken any
 * inside: helpers that are at it
 */
typedef struct Work {
    void (*go)(const struct Work *work, size piece, size begin, size end, float *room);
    size rows, rows_each, pieces, cost;
    int soon;
    float *room;
    size room_each;
    size next, threads, inside;
} Work;

static size least(size a, size b) { return a < b ? a : b; }

/* As many pieces for any number of threads, each of a multiple of so many rows, and of as many at the least. */
static void cut(Work *work, size rows, size multiple, size fewest, size most)
{
    work->rows = rows;
    work->rows_each = (rows + most * multiple - 1) / (most * multiple) * multiple;
    if (work->rows_each < fewest)
        work->rows_each = fewest;
    work->pieces = rows ? (rows + work->rows_each - 1) / work->rows_each : 1;
}

static void take_pieces(Work *work)
{
    size thread = __atomic_fetch_add(&work->threads, 1, __ATOMIC_RELAXED), piece;
    while ((piece = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->pieces) {
        size begin = piece * work->rows_each;
        work->go(work, piece, begin, least(begin + work->rows_each, work->rows), work->room + thread * work->room_each);
    }
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Threads that sleep until there is work, and look out for a while before they do where more follows; whoever comes
 * while there is some does his own alone.
 *
 * work: that may be joined
 * wanted: how many may still join it
 * soon: how many callers have more
 */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    Work *work;
    size wanted, soon, helpers;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static size read_size(const size *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

static void take_lock(void)
{
    for (int i = 0; i < TRIES; i++, relax())
        if (!pthread_mutex_trylock(&pool.lock))
            return;
    pthread_mutex_lock(&pool.lock);
}

/* Without the lock: whether somebody was wanted, or nothing more follows, before patience ended. */
static int look_out(void)
{
    for (int i = 0; i < PATIENCE; i++, relax())
        if (read_size(&pool.wanted) || !read_size(&pool.soon))
            return 1;
    return 0;
}

/* With the lock before and after: until somebody is wanted. Who comes second looks out again, some times. */
static void await_work(void)
{
    for (int lost = 0; !pool.wanted;) {
        int changed = 0;
        if (read_size(&pool.soon)) {
            pthread_mutex_unlock(&pool.lock);
            changed = look_out() && ++lost < LOSSES;
            take_lock();
        }
        if (!changed && !pool.wanted)
            pthread_cond_wait(&pool.wake, &pool.lock);
    }
}

static void *help(void *unused)
{
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        await_work();
        Work *work = pool.work;
        __atomic_sub_fetch(&pool.wanted, 1, __ATOMIC_RELEASE);
        __atomic_add_fetch(&work->inside, 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&pool.lock);
        take_pieces(work);
        take_lock(); /* who sleeps until the work is done is not missed */
        if (!__atomic_sub_fetch(&work->inside, 1, __ATOMIC_RELEASE))
            pthread_cond_broadcast(&pool.done);
    }
    return unused;
}

/* A child process has none of its parent's threads. */
static void forget_threads(void)
{
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.work = NULL;
    pool.wanted = pool.soon = pool.helpers = 0;
}

/* From the first to the last of several works that follow each other, which say so. */
static void begin_works(void) { __atomic_add_fetch(&pool.soon, 1, __ATOMIC_RELEASE); }

static void end_works(void) { __atomic_sub_fetch(&pool.soon, 1, __ATOMIC_RELEASE); }

static void do_work(Work *work, size threads)
{
    size helpers = work->cost < (work->soon ? WORTH_SHARING : WORTH_WAKING) ? 0 : least(threads, work->pieces) - 1;
    int ours = 0;
    if (helpers > 0) {
        take_lock();
        for (pthread_t thread; pool.helpers < helpers; pool.helpers++) {
            if (pthread_create(&thread, NULL, help, NULL))
                break; /* with fewer, then */
            pthread_detach(thread);
        }
        if (!pool.work) {
            ours = 1;
            pool.work = work;
            __atomic_store_n(&pool.wanted, least(helpers, pool.helpers), __ATOMIC_RELEASE);
            pthread_cond_broadcast(&pool.wake);
        }
        pthread_mutex_unlock(&pool.lock);
    }
    take_pieces(work);
    if (ours) {
        take_lock();
        pool.work = NULL; /* who wakes up late finds nothing to do */
        __atomic_store_n(&pool.wanted, 0, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&pool.lock);
        for (int i = 0; i < PATIENCE && read_size(&work->inside); i++)
            relax();
        take_lock();
        while (work->inside)
            pthread_cond_wait(&pool.done, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
    }
}
