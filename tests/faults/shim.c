/* Fails, kills at, or records file operations under one folder. Loaded by LD_PRELOAD.

   faults_arm(folder, at, error, sticky, log) starts counting. Operation number `at` fails with the
   errno `error`. -1 stands for SIGKILL, -2 for a write that moves half of its bytes. sticky: all
   later operations that such a disk refuses fail too. at = 0: none fails. log: a file that receives
   every operation, or NULL. faults_disarm() stops and returns the count. Without these calls the
   variables FAULTS_FOLDER, FAULTS_AT, FAULTS_ERROR (a number), FAULTS_STICKY and FAULTS_LOG arm the
   process when it starts.

   After faults_watch_reads(1) an operation is an open for reading or a read. Else it is an open for
   writing, a write, fsync, rename, link, unlink, mkdir, rmdir, truncate or fallocate, by whatever
   call of the C library. Writes through mmap and system calls that bypass the C library are not
   seen. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
/* Of the calls for large files: off_t has 64 bits anyhow. */
#define SAME(name, of) extern __typeof__(of) name __attribute__((alias(#of)))
#define EXCHANGE 2 /* RENAME_EXCHANGE */

/* One record of the log; the two paths and the data follow it. */
struct record {
    char name[16];
    int64_t time, offset, size; /* time: when it had ended, in ns, alike in all processes */
    int32_t error, path_length, second_length, data_length;
};

struct operation {
    const char *name;
    char path[PATH_MAX], second[PATH_MAX];
    int64_t offset, size; /* of an open: whether the file was there, and the flags */
    const void *data;
    int allocates; /* whether a full disk would refuse it */
    int changes_names;
    int halved; /* whether a write moves half of its bytes */
    int reads;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];
static long count, at;
static int error, sticky, log_fd = -1, refuses_exchange;
static int watches_reads;
static char fixed[PATH_MAX]; /* a folder without write permission, also for root */

void faults_arm(const char *path, long number, int code, int stays, const char *log) {
    pthread_mutex_lock(&lock);
    snprintf(folder, sizeof folder, "%s", path);
    count = 0, at = number, error = code, sticky = stays;
    if (log != NULL)
        log_fd = (int)syscall(SYS_openat, AT_FDCWD, log,
                              O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    pthread_mutex_unlock(&lock);
}

long faults_disarm(void) {
    pthread_mutex_lock(&lock);
    folder[0] = 0;
    if (log_fd >= 0)
        syscall(SYS_close, log_fd);
    log_fd = -1;
    long total = count;
    pthread_mutex_unlock(&lock);
    return total;
}

void faults_refuse_exchange(int refuse) { refuses_exchange = refuse; }

/* Count opens for reading and reads, in place of what changes the disk. */
void faults_watch_reads(int on) { watches_reads = on; }

void faults_fix(const char *path) { snprintf(fixed, sizeof fixed, "%s", path); }

__attribute__((constructor)) static void from_environment(void) {
    const char *path = getenv("FAULTS_FOLDER"), *number = getenv("FAULTS_AT");
    const char *code = getenv("FAULTS_ERROR");
    if (path != NULL)
        faults_arm(path, number ? atol(number) : 0, code ? atoi(code) : EIO,
                   getenv("FAULTS_STICKY") != NULL, getenv("FAULTS_LOG"));
}

static void resolve(int dir, const char *path, char *out) {
    char base[PATH_MAX] = "", link[64];
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (dir == AT_FDCWD) {
        if (getcwd(base, sizeof base) == NULL)
            base[0] = 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, base, sizeof base - 1);
        base[n < 0 ? 0 : n] = 0;
    }
    if (path[0] == 0)
        snprintf(out, PATH_MAX, "%s", base);
    else if ((size_t)snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX)
        out[0] = 0;
}

static int under(const char *path) {
    size_t n = strlen(folder);
    return n > 0 && strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int is_fixed(const char *path) {
    size_t n = strlen(fixed);
    return n > 0 && strncmp(path, fixed, n) == 0 && path[n] == '/' && !strchr(path + n + 1, '/');
}

static void record(const struct operation *op, int code) {
    if (log_fd < 0)
        return;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t time = now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
    struct record head = {"", time, op->offset, op->size, code, (int32_t)strlen(op->path),
                          (int32_t)strlen(op->second), op->data && !code ? (int32_t)op->size : 0};
    snprintf(head.name, sizeof head.name, "%s", op->name);
    syscall(SYS_write, log_fd, &head, sizeof head);
    syscall(SYS_write, log_fd, op->path, head.path_length);
    syscall(SYS_write, log_fd, op->second, head.second_length);
    syscall(SYS_write, log_fd, op->data, head.data_length);
}

/* Whether the operation is one to watch. If so the lock is held until `leave`, unless it fails. */
static int enter(struct operation *op, int *code) {
    *code = 0;
    if (folder[0] == 0)
        return 0;
    if (op->changes_names && (is_fixed(op->path) || is_fixed(op->second))) {
        *code = EACCES;
        return 1;
    }
    if (op->reads != watches_reads)
        return 0;
    pthread_mutex_lock(&lock);
    if (!under(op->path) && !under(op->second)) {
        pthread_mutex_unlock(&lock);
        return 0;
    }
    count++;
    int reached = error != ENOSPC || op->allocates;
    if (at > 0 && (count == at || (sticky && count > at && reached))) {
        if (error == -1)
            kill(getpid(), SIGKILL);
        op->halved = error == -2;
        if (op->halved)
            return 1;
        *code = error;
        record(op, error);
        pthread_mutex_unlock(&lock);
    }
    return 1;
}

static void leave(struct operation *op, int code) {
    int saved = errno;
    record(op, code);
    pthread_mutex_unlock(&lock);
    errno = saved;
}

/* Runs `call` if the operation is let through; the value is -1 with errno where it is not. */
#define GUARDED(type, op, call)                                                                    \
    int code;                                                                                      \
    int watched = enter(&op, &code);                                                               \
    if (code) {                                                                                    \
        errno = code;                                                                              \
        return -1;                                                                                 \
    }                                                                                              \
    type result = call;                                                                            \
    if (watched)                                                                                   \
        leave(&op, result < 0 ? errno : 0);                                                        \
    return result

#define ON_PATH(text, dir, file, allocating)                                                       \
    struct operation op = {.name = text, .allocates = allocating};                                 \
    if (folder[0] != 0)                                                                            \
    resolve(dir, file, op.path)

#define ON_NAME(text, dir, file, allocating)                                                       \
    ON_PATH(text, dir, file, allocating);                                                          \
    op.changes_names = 1

#define ON_FILE(text, fd, allocating) ON_PATH(text, fd, "", allocating)

#define ON_TWO(text, dir, file, other_dir, other, allocating)                                      \
    ON_NAME(text, dir, file, allocating);                                                          \
    if (folder[0] != 0)                                                                            \
    resolve(other_dir, other, op.second)

/* --- opens ----------------------------------------------------------------------------------- */

static int opens(int dir, const char *path, int flags, mode_t mode) {
    int (*real)(int, const char *, int, ...) = REAL(openat);
    int reads = !(flags & (O_WRONLY | O_RDWR | O_CREAT));
    if (folder[0] == 0 || (reads && !watches_reads))
        return real(dir, path, flags, mode);
    ON_PATH("open", dir, path, flags & O_CREAT);
    op.reads = reads;
    struct stat there;
    op.offset = fstatat(dir, path, &there, 0) == 0;
    op.changes_names = !op.offset;
    op.size = flags;
    GUARDED(int, op, real(dir, path, flags, mode));
}

#define MODE_OF(flags)                                                                             \
    mode_t mode = 0;                                                                               \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                           \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode = va_arg(rest, mode_t);                                                               \
        va_end(rest);                                                                              \
    }

int open(const char *path, int flags, ...) {
    MODE_OF(flags)
    return opens(AT_FDCWD, path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...) {
    MODE_OF(flags)
    return opens(dir, path, flags, mode);
}

int creat(const char *path, mode_t mode) {
    return opens(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

SAME(open64, open);
SAME(openat64, openat);
SAME(creat64, creat);

static FILE *opens_stream(const char *path, const char *mode) {
    FILE *(*real)(const char *, const char *) = REAL(fopen);
    int flags = mode[0] == 'w' ? O_CREAT | O_TRUNC : mode[0] == 'a' ? O_CREAT : 0;
    flags |= strchr(mode, '+') ? O_RDWR : flags ? O_WRONLY : O_RDONLY;
    if (folder[0] == 0 || flags == O_RDONLY)
        return real(path, mode);
    ON_PATH("open", AT_FDCWD, path, flags & O_CREAT);
    op.offset = access(path, F_OK) == 0;
    op.size = flags;
    int code;
    int watched = enter(&op, &code);
    if (code) {
        errno = code;
        return NULL;
    }
    FILE *result = real(path, mode);
    if (watched)
        leave(&op, result == NULL ? errno : 0);
    return result;
}

FILE *fopen(const char *path, const char *mode) { return opens_stream(path, mode); }
SAME(fopen64, fopen);

/* --- bytes ----------------------------------------------------------------------------------- */

#define READING(fd, call)                                                                          \
    if (folder[0] == 0 || !watches_reads)                                                          \
        return call;                                                                               \
    ON_FILE("read", fd, 0);                                                                        \
    op.reads = 1;                                                                                  \
    GUARDED(ssize_t, op, call)

ssize_t read(int fd, void *data, size_t size) { READING(fd, REAL(read)(fd, data, size)); }

ssize_t pread(int fd, void *data, size_t size, off_t offset) {
    READING(fd, REAL(pread)(fd, data, size, offset));
}

ssize_t readv(int fd, const struct iovec *parts, int n) {
    READING(fd, REAL(readv)(fd, parts, n));
}

ssize_t preadv(int fd, const struct iovec *parts, int n, off_t offset) {
    READING(fd, REAL(preadv)(fd, parts, n, offset));
}

ssize_t preadv2(int fd, const struct iovec *parts, int n, off_t offset, int flags) {
    READING(fd, REAL(preadv2)(fd, parts, n, offset, flags));
}

SAME(pread64, pread);
SAME(preadv64, preadv);
SAME(preadv64v2, preadv2);

/* Write at op->offset, or where the descriptor stands. */
static ssize_t put(struct operation *op, int fd, const void *data, size_t size, int placed) {
    op->size = (int64_t)size, op->data = data;
    int code;
    int watched = enter(op, &code);
    if (code) {
        errno = code;
        return -1;
    }
    size = op->halved && size > 1 ? size / 2 : size;
    ssize_t result = placed ? REAL(pwrite)(fd, data, size, op->offset) : REAL(write)(fd, data, size);
    op->size = result < 0 ? 0 : result;
    if (watched)
        leave(op, result < 0 ? errno : 0);
    return result;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    ON_FILE("write", fd, 1);
    op.offset = offset;
    return put(&op, fd, data, size, 1);
}

SAME(pwrite64, pwrite);

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = REAL(write);
    if (folder[0] == 0)
        return real(fd, data, size);
    ON_FILE("write", fd, 1);
    struct stat now;
    int appends = fcntl(fd, F_GETFL) & O_APPEND && fstat(fd, &now) == 0;
    op.offset = appends ? now.st_size : lseek(fd, 0, SEEK_CUR);
    return put(&op, fd, data, size, 0);
}

/* Several buffers are written as one, so that the log knows their bytes. */
static char *joined(const struct iovec *parts, int n, size_t *size) {
    *size = 0;
    for (int i = 0; i < n; i++)
        *size += parts[i].iov_len;
    char *all = malloc(*size + 1), *end = all;
    for (int i = 0; i < n; i++) {
        memcpy(end, parts[i].iov_base, parts[i].iov_len);
        end += parts[i].iov_len;
    }
    return all;
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    if (folder[0] == 0)
        return REAL(writev)(fd, parts, n);
    size_t size;
    char *all = joined(parts, n, &size);
    ssize_t result = write(fd, all, size);
    int saved = errno;
    free(all);
    errno = saved;
    return result;
}

ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t offset) {
    if (folder[0] == 0)
        return REAL(pwritev)(fd, parts, n, offset);
    size_t size;
    char *all = joined(parts, n, &size);
    ssize_t result = pwrite(fd, all, size, offset);
    int saved = errno;
    free(all);
    errno = saved;
    return result;
}

SAME(pwritev64, pwritev);

ssize_t pwritev2(int fd, const struct iovec *parts, int n, off_t offset, int flags) {
    if (folder[0] == 0)
        return REAL(pwritev2)(fd, parts, n, offset, flags);
    return offset == -1 ? writev(fd, parts, n) : pwritev(fd, parts, n, offset);
}

SAME(pwritev64v2, pwritev2);

/* Copies inside the kernel are refused, so that their callers read and write instead. */
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    ssize_t (*real)(int, int, off_t *, size_t) = dlsym(RTLD_NEXT, "sendfile");
    if (folder[0] == 0)
        return real(out, in, offset, size);
    errno = ENOSYS;
    return -1;
}

SAME(sendfile64, sendfile);

ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t size, unsigned flags) {
    if (folder[0] == 0)
        return REAL(copy_file_range)(in, from, out, to, size, flags);
    errno = ENOSYS;
    return -1;
}

int fsync(int fd) {
    ON_FILE("fsync", fd, 0);
    GUARDED(int, op, REAL(fsync)(fd));
}

int fdatasync(int fd) {
    ON_FILE("fsync", fd, 0);
    GUARDED(int, op, REAL(fdatasync)(fd));
}

int ftruncate(int fd, off_t size) {
    ON_FILE("truncate", fd, 0);
    op.size = size;
    GUARDED(int, op, REAL(ftruncate)(fd, size));
}

SAME(ftruncate64, ftruncate);

int truncate(const char *path, off_t size) {
    ON_PATH("truncate", AT_FDCWD, path, 0);
    op.size = size;
    GUARDED(int, op, REAL(truncate)(path, size));
}

SAME(truncate64, truncate);

int fallocate(int fd, int mode, off_t offset, off_t size) {
    ON_FILE("fallocate", fd, 1);
    op.offset = offset, op.size = size;
    GUARDED(int, op, REAL(fallocate)(fd, mode, offset, size));
}

SAME(fallocate64, fallocate);

int posix_fallocate(int fd, off_t offset, off_t size) {
    ON_FILE("fallocate", fd, 1);
    op.offset = offset, op.size = size;
    int code;
    int watched = enter(&op, &code);
    if (code)
        return code;
    int result = REAL(posix_fallocate)(fd, offset, size);
    if (watched)
        leave(&op, result);
    return result;
}

SAME(posix_fallocate64, posix_fallocate);

/* --- names ----------------------------------------------------------------------------------- */

int renameat2(int dir, const char *path, int other_dir, const char *other, unsigned flags) {
    if (folder[0] != 0 && refuses_exchange && flags & EXCHANGE) {
        errno = EINVAL;
        return -1;
    }
    ON_TWO(flags & EXCHANGE ? "exchange" : "rename", dir, path, other_dir, other, 1);
    GUARDED(int, op, (int)syscall(SYS_renameat2, dir, path, other_dir, other, flags));
}

int renameat(int dir, const char *path, int other_dir, const char *other) {
    return renameat2(dir, path, other_dir, other, 0);
}

int rename(const char *path, const char *other) {
    return renameat2(AT_FDCWD, path, AT_FDCWD, other, 0);
}

int linkat(int dir, const char *path, int other_dir, const char *other, int flags) {
    ON_TWO("link", dir, path, other_dir, other, 1);
    GUARDED(int, op, REAL(linkat)(dir, path, other_dir, other, flags));
}

int link(const char *path, const char *other) { return linkat(AT_FDCWD, path, AT_FDCWD, other, 0); }

int symlinkat(const char *target, int dir, const char *path) {
    ON_NAME("symlink", dir, path, 1);
    if (folder[0] != 0)
        op.data = target, op.size = (int64_t)strlen(target);
    GUARDED(int, op, REAL(symlinkat)(target, dir, path));
}

int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

int mkdirat(int dir, const char *path, mode_t mode) {
    ON_NAME("mkdir", dir, path, 1);
    GUARDED(int, op, REAL(mkdirat)(dir, path, mode));
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int dir, const char *path, int flags) {
    ON_NAME(flags & AT_REMOVEDIR ? "rmdir" : "unlink", dir, path, 0);
    GUARDED(int, op, REAL(unlinkat)(dir, path, flags));
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int remove(const char *path) {
    int result = unlink(path);
    return result < 0 && errno == EISDIR ? rmdir(path) : result;
}

int access(const char *path, int mode) {
    if (fixed[0] != 0 && mode & W_OK && strcmp(path, fixed) == 0) {
        errno = EACCES;
        return -1;
    }
    return REAL(access)(path, mode);
}
