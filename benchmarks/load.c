/* A load of GET requests on one URL, from one thread.
 *
 *   load HOST PORT PATH CONNECTIONS keep|new BODY_BYTES SECONDS|COUNTx
 *
 * Keeps CONNECTIONS connections busy, each with one request at a time; `new` opens a connection for each
 * request, asks the server to close it and waits until it has. Ends after SECONDS, or (`256x`) after that
 * many requests, 120 s at most. Every answer must be a 200 whose Content-Length and body are BODY_BYTES
 * long; anything else is an error, told on standard error, and ends the run with status 1.
 * Prints one line: requests, body bytes, seconds, slowest request in ms.
 * Why not wrk: it reads 8 KB at a time, so with large bodies it would be measured, not the server.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 4096, BUFFER_BYTES = 64 * 1024, LIMIT_SECONDS = 120 };
enum phase { CONNECTING, HEAD, BODY, CLOSING };

struct connection {
    int fd;
    enum phase phase;
    size_t head_length;
    long long body_left;
    double started;
    char head[HEAD_BYTES + 1];
};

static struct sockaddr_in address;
static char request[2048];
static size_t request_length;
static int new_each, poller;
static long long body_bytes, wanted, begun, requests, bytes;
static double slowest;
static char buffer[BUFFER_BYTES];

static void fail(const char *what) {
    fprintf(stderr, "load: %s\n", what);
    exit(1);
}

static void fail_errno(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void watch(struct connection *c, int operation, unsigned events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poller, operation, c->fd, &event)) fail_errno("epoll_ctl");
}

static void send_request(struct connection *c) {
    if (send(c->fd, request, request_length, MSG_NOSIGNAL) != (ssize_t)request_length) fail_errno("send");
    c->phase = HEAD;
    c->head_length = 0;
}

/* Starts a request, on a new connection where there is none; does nothing once all wanted are begun. */
static void begin(struct connection *c) {
    int on = 1;
    if (wanted && begun == wanted) return;
    begun++;
    c->started = now();
    if (c->fd >= 0) {
        send_request(c);
        return;
    }
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) fail_errno("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) fail_errno("connect");
    c->phase = CONNECTING;
    watch(c, EPOLL_CTL_ADD, EPOLLOUT);
}

static void drop(struct connection *c) {
    close(c->fd);
    c->fd = -1;
}

static void count(struct connection *c) {
    double took = now() - c->started;
    if (took > slowest) slowest = took;
    requests++;
}

/* The body is complete: the next request, at once or when the server has closed. */
static void body_done(struct connection *c) {
    if (new_each) {
        c->phase = CLOSING;
        return;
    }
    count(c);
    c->phase = HEAD;
    begin(c);
}

static void take_body(struct connection *c, long long length) {
    if (length > c->body_left) fail("more body than Content-Length says");
    c->body_left -= length;
    bytes += length;
    if (!c->body_left) body_done(c);
}

static void take_head(struct connection *c, size_t length) {
    char *end, *field;
    c->head_length += length;
    c->head[c->head_length] = 0;
    end = memmem(c->head, c->head_length, "\r\n\r\n", 4);
    if (!end) {
        if (c->head_length == HEAD_BYTES) fail("head too long");
        return;
    }
    if (strncmp(c->head, "HTTP/1.1 200 ", 13)) {
        fprintf(stderr, "load: %.60s\n", c->head);
        fail("not a 200");
    }
    field = strcasestr(c->head, "\r\ncontent-length:");
    if (!field || field > end) fail("no Content-Length");
    if (atoll(field + 17) != body_bytes) fail("another Content-Length than expected");
    c->phase = BODY;
    c->body_left = body_bytes;
    take_body(c, (long long)(c->head + c->head_length - (end + 4)));
}

/* Reads once: connections that have more must wait for the others, so that all downloads advance together. */
static void take(struct connection *c) {
    int in_head = c->phase == HEAD;
    char *into = in_head ? c->head + c->head_length : buffer;
    size_t room = in_head ? HEAD_BYTES - c->head_length : sizeof buffer;
    ssize_t got = recv(c->fd, into, room, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got < 0) fail_errno("recv");
    if (!got) {
        if (c->phase != CLOSING) fail("connection closed within an answer");
        count(c);
        drop(c);
        begin(c);
        return;
    }
    if (c->phase == CLOSING) fail("bytes after the body");
    if (in_head) take_head(c, (size_t)got);
    else take_body(c, got);
}

static void ready(struct connection *c) {
    int failed = 0;
    socklen_t length = sizeof failed;
    if (c->phase == CONNECTING) {
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &failed, &length);
        if (failed) errno = failed, fail_errno("connect");
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
        send_request(c);
        return;
    }
    take(c);
}

static void run(struct connection *all, int connections, double seconds) {
    struct epoll_event events[256];
    double start = now(), deadline = start + (wanted ? LIMIT_SECONDS : seconds), at = start;
    for (int i = 0; i < connections; i++) begin(&all[i]);
    while ((!wanted || requests < wanted) && (at = now()) < deadline) {
        int wait_ms = (int)((deadline - at) * 1000) + 1;
        int count = epoll_wait(poller, events, 256, wait_ms);
        if (count < 0 && errno != EINTR) fail_errno("epoll_wait");
        for (int i = 0; i < count; i++) ready(events[i].data.ptr);
    }
    if (wanted && requests < wanted) fail("not done within the limit");
    printf("%lld %lld %.6f %.3f\n", requests, bytes, now() - start, slowest * 1e3);
}

int main(int argc, char **argv) {
    struct connection *all;
    int connections;
    if (argc != 8) fail("usage: load HOST PORT PATH CONNECTIONS keep|new BODY_BYTES SECONDS|COUNTx");
    address.sin_family = AF_INET;
    address.sin_port = htons((unsigned short)atoi(argv[2]));
    if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1) fail("HOST must be an IPv4 address");
    connections = atoi(argv[4]);
    new_each = !strcmp(argv[5], "new");
    body_bytes = atoll(argv[6]);
    wanted = strchr(argv[7], 'x') ? atoll(argv[7]) : 0;
    request_length = (size_t)snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: %s:%s\r\n%s\r\n", argv[3],
                                      argv[1], argv[2], new_each ? "Connection: close\r\n" : "");
    if (request_length >= sizeof request) fail("PATH too long");
    poller = epoll_create1(EPOLL_CLOEXEC);
    all = calloc((size_t)connections, sizeof *all);
    if (poller < 0 || !all) fail_errno("start");
    for (int i = 0; i < connections; i++) all[i].fd = -1;
    run(all, connections, atof(argv[7]));
    return 0;
}
