/* An imitation of CUDA's driver in which device memory is host memory, for tests of the real cuda.core without a GPU.

   Streams are as lazy as CUDA allows: work runs only when somebody waits for it, and then only what it must follow. So a
   missing wait between two streams gives wrong numbers in every run, and not in one of a thousand. Every call that
   matters is noted in a log, which tests read. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef uintptr_t Ptr;
enum { OK = 0, INVALID = 1, NOT_FOUND = 500, STREAM_CAPTURE_UNSUPPORTED = 900, STREAM_CAPTURE_INVALIDATED = 901 };

typedef struct { Ptr p[6]; int32_t i[7]; float f[2]; Ptr hidden[2]; } HeadArguments;
typedef struct Event Event;
typedef struct Op Op;
typedef struct Stream Stream;
typedef struct Graph Graph;
struct Op {
    enum { COPY, COMPUTE, HEAD, WAIT, RECORD, LAUNCH } kind;
    Ptr to, from;
    size_t bytes;
    int rows, in_columns, out_columns, as_floats, as_half;
    HeadArguments head;
    Event *event;
    long ticket;
    Graph *graph;
    Op *next;
};
struct Event { Stream *stream; long ticket; };  /* `ticket` operations of `stream` come before it */
struct Stream { int number; long enqueued, done; Op *first, *last; Graph *capturing; int invalid; };
struct Graph { int number; Op *first, *last; int dead; };  /* never freed, so that a second end is seen */

/* The real driver would crash, now or later. */
static void destroy(Graph *g, const char *what) {
    if (!g || g->dead) { fprintf(stderr, "imitated driver: a %s that is not there any more is destroyed\n", what); abort(); }
    g->dead = 1;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *text;
static size_t used, room;
static int streams, graphs, fail_allocations = -1, fail_waiting;

static void note(const char *format, ...) {
    va_list list;
    if (room - used < 400) text = realloc(text, room = 2 * room + 4096);
    va_start(list, format);
    used += vsnprintf(text + used, room - used - 2, format, list);
    va_end(list);
    text[used++] = '\n';
    text[used] = 0;
}
const char *imitated_log(void) { return text ? text : ""; }
void imitated_log_clear(void) { used = 0; if (text) text[0] = 0; }
/* Allocations fail after so many more; -1: none does. Waiting for a stream fails, or not. */
void imitated_fail_allocations(int after) { fail_allocations = after; }
void imitated_fail_waiting(int yes) { fail_waiting = yes; }

static void compute(const Op *op) {
    for (int r = 0; r < op->rows; r++) {
        double sum = 0;
        for (int j = 0; j < op->in_columns; j++) {
            size_t at = (size_t)r * op->in_columns + j;
            sum += (j % 7 + 1) * (op->as_floats ? ((float *)op->from)[at] : ((int32_t *)op->from)[at]);
        }
        for (int c = 0; c < op->out_columns; c++) {
            size_t at = (size_t)r * op->out_columns + c;
            if (op->as_half) ((uint16_t *)op->to)[at] = (uint16_t)((int64_t)sum % 1000 + c);
            else ((float *)op->to)[at] = (float)(sum + c);
        }
    }
}
static void head(const HeadArguments *a) {  /* reduced = states + shift, so that weights must have arrived too */
    const uint16_t *states = (const uint16_t *)a->p[0];
    for (int r = 0; r < a->i[0]; r++)
        for (int j = 0; j < a->i[3]; j++)
            ((float *)a->p[5])[(size_t)r * a->i[3] + j] = states[(size_t)r * a->i[5] + j] + ((float *)a->p[3])[j];
}
static void run_until(Stream *stream, long ticket);
static void run_one(Op *op, int stream) {
    if (op->kind == COPY) { note("run copy stream %d bytes %zu", stream, op->bytes); memcpy((void *)op->to, (void *)op->from, op->bytes); }
    if (op->kind == COMPUTE) { note("run compute stream %d rows %d", stream, op->rows); compute(op); }
    if (op->kind == HEAD) { note("run head stream %d rows %d", stream, op->head.i[0]); head(&op->head); }
    if (op->kind == WAIT && op->event->stream) run_until(op->event->stream, op->ticket);
    if (op->kind == LAUNCH) for (Op *o = op->graph->first; o; o = o->next) run_one(o, stream);
}
static void run_until(Stream *stream, long ticket) {
    while (stream->done < ticket && stream->first) {
        Op *op = stream->first;
        stream->first = op->next;
        if (!stream->first) stream->last = NULL;
        stream->done++;
        run_one(op, stream->number);
        free(op);
    }
}
static void push(Stream *stream, Op op) {
    Op *copy = malloc(sizeof op);
    *copy = op;
    copy->next = NULL;
    Op **first = stream->capturing ? &stream->capturing->first : &stream->first;
    Op **last = stream->capturing ? &stream->capturing->last : &stream->last;
    if (*last) (*last)->next = copy; else *first = copy;
    *last = copy;
    if (!stream->capturing) stream->enqueued++;
}
#define LOCKED(body) pthread_mutex_lock(&lock); body; pthread_mutex_unlock(&lock); return OK

/* What the imitated engine enqueues. */
int imitated_compute(Stream *stream, Ptr to, Ptr from, int rows, int in_columns, int out_columns, int floats, int half) {
    LOCKED(note("%s compute stream %d rows %d", stream->capturing ? "capture" : "enqueue", stream->number, rows);
           push(stream, (Op){.kind = COMPUTE, .to = to, .from = from, .rows = rows, .in_columns = in_columns,
                             .out_columns = out_columns, .as_floats = floats, .as_half = half}));
}

/* Devices and contexts. */
static int context_token;
CUresult cuInit(unsigned flags) { return OK; }
static int version = 13000;
void imitated_driver_version(int takes) { version = takes; }
CUresult cuDriverGetVersion(int *v) { *v = version; return OK; }
CUresult cuDeviceGetCount(int *n) { *n = 2; return OK; }
CUresult cuDeviceGet(int *d, int n) { *d = n; return n < 2 ? OK : 101; }
CUresult cuDeviceGetName(char *name, int n, int d) { snprintf(name, n, "Imitated GPU"); return OK; }
CUresult cuDeviceTotalMem_v2(size_t *n, int d) { *n = 8ull << 30; return OK; }
CUresult cuDeviceGetUuid(void *uuid, int d) { memset(uuid, d + 1, 16); return OK; }
CUresult cuDeviceGetAttribute(int *v, int a, int d) {
    *v = a == 75 ? 8 : a == 76 ? 9 : a == 1 ? 1024 : 1;  /* compute capability 8.9 */
    return OK;
}
CUresult cuDevicePrimaryCtxRetain(void **c, int d) { *c = (char *)&context_token + d; return OK; }
CUresult cuDevicePrimaryCtxRelease(int d) { return OK; }
static __thread void *current;
CUresult cuCtxGetCurrent(void **c) { *c = current; return OK; }
CUresult cuCtxSetCurrent(void *c) { current = c; return OK; }
CUresult cuCtxPushCurrent(void *c) { current = c; return OK; }
CUresult cuCtxPopCurrent(void **c) { *c = current; return OK; }
CUresult cuCtxGetDevice(int *d) { *d = current ? (int)((char *)current - (char *)&context_token) : 0; return current ? OK : 201; }
CUresult cuCtxGetDevice_v2(int *d, void *c) { *d = (int)((char *)c - (char *)&context_token); return OK; }
CUresult cuCtxSynchronize(void) { return OK; }
CUresult cuGetErrorName(CUresult e, const char **s) { *s = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_IMITATED"; return OK; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = e == 2 ? "out of memory" : "imitated error"; return OK; }
CUresult cuMemGetInfo(size_t *f, size_t *t) { *f = 7u << 28; *t = 8u << 28; return OK; }

/* Memory. */
static CUresult allocate(Ptr *p, size_t n, const char *where) {
    if (!fail_allocations) return 2;
    if (fail_allocations > 0) fail_allocations--;
    *p = (Ptr)aligned_alloc(256, (n + 255) / 256 * 256);
    memset((void *)*p, 0xAB, n);
    LOCKED(note("allocate %s %zu", where, n));
}
static CUresult release(Ptr p) { LOCKED(note("free"); free((void *)p)); }
static char device_pool, host_pool;
CUresult cuDeviceGetDefaultMemPool(void **pool, int d) { *pool = &device_pool; return OK; }
CUresult cuDeviceGetMemPool(void **pool, int d) { *pool = &device_pool; return OK; }
CUresult cuMemGetDefaultMemPool(void **pool, void *location, int type) { *pool = &host_pool; return OK; }
CUresult cuMemGetMemPool(void **pool, void *location, int type) { *pool = &host_pool; return OK; }
CUresult cuMemPoolGetAttribute(void *pool, int a, void *v) { *(uint64_t *)v = 0; return OK; }
CUresult cuMemPoolSetAttribute(void *pool, int a, void *v) { return OK; }
CUresult cuMemPoolSetAccess(void *pool, const void *d, size_t n) { return OK; }
CUresult cuMemPoolCreate(void **pool, const int *properties) { *pool = properties[2] == 1 ? &device_pool : &host_pool; return OK; }
CUresult cuMemPoolDestroy(void *pool) { LOCKED(note("destroy pool")); }
CUresult cuMemAllocFromPoolAsync(Ptr *p, size_t n, void *pool, Stream *s) { return allocate(p, n, pool == &host_pool ? "pinned" : "device"); }
CUresult cuMemAllocAsync(Ptr *p, size_t n, Stream *s) { return allocate(p, n, "device"); }
CUresult cuMemAlloc(Ptr *p, size_t n) { return allocate(p, n, "device"); }
CUresult cuMemAllocHost(void **p, size_t n) { return allocate((Ptr *)p, n, "pinned"); }
CUresult cuMemFreeAsync(Ptr p, Stream *s) {
    pthread_mutex_lock(&lock);
    if (s) run_until(s, s->enqueued);
    pthread_mutex_unlock(&lock);
    return release(p);
}
CUresult cuMemFree(Ptr p) { return release(p); }
CUresult cuMemFreeHost(void *p) { return release((Ptr)p); }
CUresult cuPointerGetAttributes(unsigned n, int *a, void **v, Ptr p) {
    for (unsigned i = 0; i < n; i++) *(uint64_t *)v[i] = 0;
    return OK;
}
CUresult cuMemcpyAsync(Ptr to, Ptr from, size_t n, Stream *s) {
    LOCKED(note("enqueue copy stream %d bytes %zu", s->number, n); push(s, (Op){.kind = COPY, .to = to, .from = from, .bytes = n}));
}

/* Streams and events. */
CUresult cuStreamCreateWithPriority(Stream **s, unsigned flags, int priority) {
    LOCKED(*s = calloc(1, sizeof **s); (*s)->number = streams++; note("create stream %d", (*s)->number));
}
CUresult cuCtxGetStreamPriorityRange(int *low, int *high) { *low = *high = 0; return OK; }
CUresult cuStreamDestroy(Stream *s) { LOCKED(run_until(s, s->enqueued); note("destroy stream %d", s->number)); }
CUresult cuStreamSynchronize(Stream *s) {
    if (s->capturing) return STREAM_CAPTURE_UNSUPPORTED;
    if (fail_waiting) return 700;
    LOCKED(run_until(s, s->enqueued));
}
CUresult cuStreamGetCtx(Stream *s, void **c) { *c = current; return OK; }
CUresult cuStreamGetFlags(Stream *s, unsigned *f) { *f = 1; return OK; }
CUresult cuStreamGetPriority(Stream *s, int *p) { *p = 0; return OK; }
CUresult cuStreamGetDevice(Stream *s, int *d) { return cuCtxGetDevice(d); }
CUresult cuStreamGetId(Stream *s, unsigned long long *id) { *id = s->number; return OK; }
CUresult cuStreamWaitEvent(Stream *s, Event *e, unsigned flags) {
    LOCKED(note("wait stream %d for stream %d", s->number, e->stream ? e->stream->number : -1);
           push(s, (Op){.kind = WAIT, .event = e, .ticket = e->ticket}));
}
CUresult cuEventCreate(Event **e, unsigned flags) { *e = calloc(1, sizeof **e); return OK; }
CUresult cuEventDestroy(Event *e) { return OK; }  /* kept: a lazy wait may still look at it */
CUresult cuEventRecord(Event *e, Stream *s) { LOCKED(e->stream = s; e->ticket = s->enqueued); }
CUresult cuEventSynchronize(Event *e) { LOCKED(if (e->stream) run_until(e->stream, e->ticket)); }
CUresult cuEventQuery(Event *e) { return !e->stream || e->stream->done >= e->ticket ? OK : 600; }

/* Graphs. */
CUresult cuStreamBeginCapture(Stream *s, int mode) {
    LOCKED(s->capturing = calloc(1, sizeof(Graph)); s->capturing->number = graphs++; note("capture graph %d stream %d mode %d", s->capturing->number, s->number, mode));
}
CUresult cuStreamEndCapture(Stream *s, Graph **g) {
    int invalid = s->invalid;
    s->invalid = 0;
    if (invalid) destroy(s->capturing, "graph");
    *g = invalid ? NULL : s->capturing;
    s->capturing = NULL;
    return invalid ? STREAM_CAPTURE_INVALIDATED : OK;
}
/* As when something is called that no capture allows. */
void imitated_invalidate(Stream *s) { s->invalid = 1; }
CUresult cuStreamIsCapturing(Stream *s, int *status) { *status = s && s->capturing ? 1 + s->invalid : 0; return OK; }
CUresult cuStreamGetCaptureInfo(Stream *s, int *status, unsigned long long *id, Graph **g, void *deps, void *edges, size_t *n) {
    *status = s && s->capturing ? 1 + s->invalid : 0;
    if (id) *id = 1;
    if (g) *g = s ? s->capturing : NULL;
    if (n) *n = 0;
    return OK;
}
CUresult cuGraphInstantiateWithFlags(Graph **exec, Graph *g, unsigned long long flags) {
    if (g->dead) return INVALID;
    *exec = malloc(sizeof **exec);
    **exec = *g;
    return OK;
}
CUresult cuGraphUpload(Graph *g, Stream *s) { return OK; }
CUresult cuGraphLaunch(Graph *g, Stream *s) { LOCKED(note("launch graph %d stream %d", g->number, s->number); push(s, (Op){.kind = LAUNCH, .graph = g})); }
CUresult cuGraphDestroy(Graph *g) { LOCKED(destroy(g, "graph")); }
CUresult cuGraphExecDestroy(Graph *g) { LOCKED(destroy(g, "launched graph"); note("destroy graph %d", g->number)); }
CUresult cuUserObjectCreate(void **o, void *p, void *f, unsigned n, unsigned flags) { *o = p; return OK; }
CUresult cuGraphRetainUserObject(Graph *g, void *o, unsigned n, unsigned flags) { return OK; }


CUresult cuUserObjectRelease(void *o, unsigned n) { return OK; }
CUresult cuGraphReleaseUserObject(Graph *g, void *o, unsigned n) { return OK; }

/* Kernels: the one kernel there is takes the arguments of the PCA head. */
CUresult cuLibraryLoadData(void **lib, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) { *lib = malloc(1); return OK; }
CUresult cuLibraryUnload(void *lib) { LOCKED(note("unload kernels")); }
CUresult cuLibraryGetKernel(void **k, void *lib, const char *name) { *k = strdup(name); return OK; }
CUresult cuKernelGetFunction(void **f, void *k) { *f = k; return OK; }
CUresult cuKernelGetAttribute(int *v, int a, void *k, int d) { *v = 0; return OK; }
CUresult cuKernelGetParamInfo(void *k, size_t i, size_t *offset, size_t *size) { return INVALID; }
typedef struct { unsigned grid[3], block[3], shared; Stream *stream; void *attributes; unsigned count; } LaunchConfig;
CUresult cuLaunchKernelEx(const LaunchConfig *c, void *f, void **params, void **extra) {
    HeadArguments a;
    int at = 0;
    for (int i = 0; i < 6; i++) a.p[i] = *(Ptr *)params[at++];
    for (int i = 0; i < 7; i++) a.i[i] = *(int32_t *)params[at++];
    for (int i = 0; i < 2; i++) a.f[i] = *(float *)params[at++];
    for (int i = 0; i < 2; i++) a.hidden[i] = *(Ptr *)params[at++];
    LOCKED(note("%s kernel %s stream %d grid %u block %u shared %u rows %d width %d dim %d k %d k_start %d strides %d %d eps %g floor %g hidden %zu %zu",
                c->stream->capturing ? "capture" : "enqueue", (char *)f, c->stream->number, c->grid[0], c->block[0], c->shared,
                a.i[0], a.i[1], a.i[2], a.i[3], a.i[4], a.i[5], a.i[6], a.f[0], a.f[1], (size_t)a.hidden[0], (size_t)a.hidden[1]);
           push(c->stream, (Op){.kind = HEAD, .head = a}));
}
CUresult cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, Stream *s, void **params, void **extra) {
    LaunchConfig c = {{gx, gy, gz}, {bx, by, bz}, shared, s, 0, 0};
    return cuLaunchKernelEx(&c, f, params, extra);
}

CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags, void *status) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    Dl_info found, own;
    dladdr((void *)cuInit, &own);
    if (*function && (!dladdr(*function, &found) || found.dli_fbase != own.dli_fbase)) *function = NULL;
    if (status) *(int *)status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, void *status) {
    return cuGetProcAddress(symbol, function, version, flags, status);
}
