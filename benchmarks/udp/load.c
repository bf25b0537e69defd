/* load: both ends of a UDP relay that is measured, in one process: clients and the echo server.
 *
 * The clients are as many sessions as asked for, each a source address of its own out of
 * 127.0.0.0/8, all through one socket: so the load needs less CPU than what it measures, and the
 * relay is what limits the rate. They work in a closed loop: a request is sent when one before it
 * was answered, or is given up after a second.
 *
 *     load ECHO_PORT CLIENT_PORT SPIN
 *
 * SPIN 1: never sleep during a run. The relay then pays for no wake-ups of this process.
 * Prints "ready", then reads one run a line from standard input and answers it with a line of JSON:
 *
 *     PORT SESSIONS PAYLOAD WINDOW REQUESTS SECONDS NEWCOMERS
 *
 * PORT      the relay on 127.0.0.1, or ECHO_PORT itself
 * PAYLOAD   bytes in a datagram
 * WINDOW    requests in flight, taken from all sessions in turn
 * REQUESTS  how many to make; 0: as many as go into SECONDS
 * NEWCOMERS sources that each send one datagram, evenly among the requests, and wait for nothing
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdbool.h>

#define ROOM (65536 + 192) /* for a datagram */
#include "batches.h"

#define SESSIONS 65536
#define SESSION_ADDRESSES 0x7f100000u  /* 127.16.0.0 */
#define NEWCOMER_ADDRESSES 0x7f200000u /* 127.32.0.0 */
#define MAGIC 0x6b616d616c756470ull
#define NEWCOMER UINT64_MAX /* in the place of a request's number */
#define LOST_AFTER (1000 * MILLISECOND)
#define STALLED_AFTER (5000 * MILLISECOND)
/* Requests between the oldest open one and the newest: one that is lost must not hold up others. */
#define NUMBERS (1 << 20)
#define BUCKETS (1 << 18)
#define BUCKET_NANOSECONDS 256

/* What a datagram begins with; its last eight bytes are the number once more. */
struct header {
	uint64_t magic, number, sent;
	uint32_t session, length;
};

/* A request, at its number modulo NUMBERS. */
struct request {
	uint64_t number, sent;
	uint32_t session;
	bool open;
};

struct run {
	int port, sessions, payload, window, requests, seconds, newcomers;
};

struct counts {
	uint64_t sent, answered, lost, late, out_of_order, wrong, newcomers, newcomers_answered;
	bool stalled;
};

static int echo_port, echo_socket, client_socket;
static bool spin;
static struct batch echoed, outgoing, incoming;
static struct request requests[NUMBERS];
static uint64_t latest_of[SESSIONS]; /* the last number that a session has got back */
static uint64_t next_number, oldest; /* numbers go on from run to run */
static uint32_t ready[SESSIONS];     /* a ring of the sessions whose turn comes */
static uint32_t ready_first, ready_count;
static uint32_t latency[BUCKETS];
static int in_flight;
static struct run run;
static struct counts counts;

/* Send back what came; the kernel's note of the local address becomes the one to answer from. */
static int serve_echo(void)
{
	int at, got = receive(echo_socket, &echoed);

	for (at = 0; at < got; at++)
		echoed.parts[at].iov_len = echoed.messages[at].msg_len;
	if (got)
		send_batch(echo_socket, &echoed, got);
	return got;
}

static void fill(int at, uint32_t source, uint32_t session, uint64_t number, uint64_t time)
{
	struct header header = {MAGIC, number, time, session, run.payload};
	struct in_pktinfo from = {.ipi_spec_dst.s_addr = htonl(source)};
	struct cmsghdr *local = &outgoing.local[at].head;

	memcpy(outgoing.bytes[at] + run.payload - sizeof(number), &number, sizeof(number));
	memcpy(outgoing.bytes[at], &header, sizeof(header));
	outgoing.parts[at].iov_len = run.payload;
	outgoing.peers[at] = (struct sockaddr_in){
		.sin_family = AF_INET,
		.sin_port = htons(run.port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	local->cmsg_level = IPPROTO_IP;
	local->cmsg_type = IP_PKTINFO;
	local->cmsg_len = CMSG_LEN(sizeof(from));
	memcpy(CMSG_DATA(local), &from, sizeof(from));
}

static void make_ready(uint32_t session)
{
	ready[(ready_first + ready_count++) % SESSIONS] = session;
}

static int send_requests(uint64_t time)
{
	struct request *request;
	int count = 0;

	while (count < BATCH && ready_count && in_flight < run.window &&
	       (!run.requests || counts.sent < (uint64_t)run.requests) &&
	       next_number - oldest < NUMBERS) {
		request = &requests[next_number % NUMBERS];
		*request = (struct request){next_number, time, ready[ready_first], true};
		ready_first = (ready_first + 1) % SESSIONS;
		ready_count--;
		fill(count++, SESSION_ADDRESSES + request->session, request->session, next_number++,
		     time);
		in_flight++;
		counts.sent++;
	}
	if (count)
		send_batch(client_socket, &outgoing, count);
	return count;
}

static void send_newcomers(uint64_t time)
{
	uint64_t due = counts.sent * run.newcomers / (run.requests ? run.requests : 1);
	int count;

	while (counts.newcomers < due) {
		for (count = 0; count < BATCH && counts.newcomers < due; count++) {
			fill(count, NEWCOMER_ADDRESSES + counts.newcomers, counts.newcomers, NEWCOMER,
			     time);
			counts.newcomers++;
		}
		send_batch(client_socket, &outgoing, count);
	}
}

static void close_request(struct request *request)
{
	request->open = false;
	in_flight--;
	make_ready(request->session);
}

static void take_answer(const struct mmsghdr *message, uint64_t time)
{
	const struct msghdr *head = &message->msg_hdr;
	const char *bytes = head->msg_iov->iov_base;
	const struct sockaddr_in *peer = head->msg_name;
	const struct cmsghdr *local = CMSG_FIRSTHDR(head);
	struct request *request;
	struct header header;
	uint64_t number, bucket;
	uint32_t address;

	if (message->msg_len < sizeof(header) + sizeof(number) || !local) {
		counts.wrong++;
		return;
	}
	memcpy(&header, bytes, sizeof(header));
	memcpy(&number, bytes + message->msg_len - sizeof(number), sizeof(number));
	address = ntohl(((const struct in_pktinfo *)CMSG_DATA(local))->ipi_addr.s_addr);
	if (header.magic != MAGIC || header.length != message->msg_len || header.number != number ||
	    (number != NEWCOMER && address != SESSION_ADDRESSES + header.session) ||
	    (number == NEWCOMER && address != NEWCOMER_ADDRESSES + header.session)) {
		counts.wrong++;
		return;
	}
	if (number == NEWCOMER) {
		counts.newcomers_answered++;
		return;
	}
	request = &requests[number % NUMBERS];
	if (request->number != number || !request->open) {
		counts.late++; /* or twice */
		return;
	}
	if (ntohs(peer->sin_port) != run.port || request->session != header.session) {
		counts.wrong++;
		return;
	}
	if (number < latest_of[request->session])
		counts.out_of_order++;
	else
		latest_of[request->session] = number;
	bucket = (time - request->sent) / BUCKET_NANOSECONDS;
	latency[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
	counts.answered++;
	close_request(request);
}

static int take_answers(void)
{
	int at, got = receive(client_socket, &incoming);
	uint64_t time = got ? now() : 0;

	for (at = 0; at < got; at++)
		take_answer(&incoming.messages[at], time);
	return got;
}

static void give_up_old_requests(uint64_t time)
{
	for (; oldest < next_number; oldest++) {
		struct request *request = &requests[oldest % NUMBERS];

		if (request->open) {
			if (time - request->sent < LOST_AFTER)
				return;
			counts.lost++;
			close_request(request);
		}
	}
}

static void rest(void)
{
	struct pollfd sockets[] = {{echo_socket, POLLIN, 0}, {client_socket, POLLIN, 0}};

	if (!spin && poll(sockets, 2, 10) < 0 && errno != EINTR)
		die("poll");
}

/* Return the latency in seconds that the given part of the requests does not exceed. */
static double percentile(double part)
{
	uint64_t wanted = counts.answered * part, seen = 0, at;

	for (at = 0; at < BUCKETS - 1; at++) {
		seen += latency[at];
		if (seen > wanted)
			break;
	}
	return (at + 0.5) * BUCKET_NANOSECONDS / 1e9;
}

static void measure(void)
{
	uint64_t began = now(), time = began, answered = 0, last_answer = began;
	int at, turns = run.sessions > run.window ? run.sessions : run.window;
	bool sending = true;

	memset(&counts, 0, sizeof(counts));
	memset(latency, 0, sizeof(latency));
	ready_first = ready_count = 0;
	for (at = 0; at < turns; at++)
		make_ready(at % run.sessions);
	while (sending || in_flight) {
		int moved = sending ? send_requests(time) : 0;

		send_newcomers(time);
		moved += serve_echo();
		moved += take_answers();
		time = now();
		give_up_old_requests(time);
		if (answered != counts.answered) {
			answered = counts.answered;
			last_answer = time;
		}
		counts.stalled = time - last_answer > STALLED_AFTER;
		sending = !counts.stalled &&
			  (run.requests ? counts.sent < (uint64_t)run.requests
					: time - began < run.seconds * 1000 * MILLISECOND);
		if (!moved)
			rest();
	}
	printf("{\"requests\": %lu, \"answered\": %lu, \"lost\": %lu, \"late\": %lu, "
	       "\"out_of_order\": %lu, \"wrong\": %lu, \"newcomers_answered\": %lu, "
	       "\"stalled\": %s, \"seconds\": %.9f, \"median\": %.9f, \"p99\": %.9f}\n",
	       counts.sent, counts.answered, counts.lost, counts.late, counts.out_of_order,
	       counts.wrong, counts.newcomers_answered, counts.stalled ? "true" : "false",
	       (time - began) / 1e9, percentile(0.5), percentile(0.99));
}

int main(int argc, char **argv)
{
	char line[256];

	if (argc != 4) {
		fprintf(stderr, "usage: load ECHO_PORT CLIENT_PORT SPIN\n");
		return 2;
	}
	echo_port = atoi(argv[1]);
	spin = atoi(argv[3]);
	/* Every address of 127.0.0.0/8 is the client's; the echo server has one. */
	echo_socket = open_socket(INADDR_LOOPBACK, echo_port);
	client_socket = open_socket(INADDR_ANY, atoi(argv[2]));
	prepare(&echoed);
	prepare(&outgoing);
	prepare(&incoming);
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "%d %d %d %d %d %d %d", &run.port, &run.sessions, &run.payload,
			   &run.window, &run.requests, &run.seconds, &run.newcomers) != 7 ||
		    run.sessions < 1 || run.sessions > SESSIONS || run.window < 1 ||
		    run.window > SESSIONS || run.newcomers > SESSIONS ||
		    run.payload < (int)(sizeof(struct header) + sizeof(uint64_t)) ||
		    run.payload > 65536) {
			fprintf(stderr, "not a run: %s", line);
			return 2;
		}
		measure();
		fflush(stdout);
	}
	return 0;
}
