// A worker in C++ for Linux, written from docs/protocol.md:  ./worker ENDPOINT [PATIENCE]
#include <sys/signalfd.h>
#include <unistd.h>
#include <csignal>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>
#include <zmq.hpp>
#include "tcp.hpp"

using nlohmann::json;  // reads and writes msgpack too
using Bytes = std::vector<std::uint8_t>;
using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::milliseconds;

// The services: put your own here. Jobs of the codecs "text" and "" (bytes) are a string,
// and are best answered by one. What a service throws is told to the caller.

json square(const json& data) {
    const json number = data.is_string() ? json::parse(data.get<std::string>()) : data;
    if (!number.is_number_integer() || std::abs(number.get<double>()) > 3e9)
        throw std::invalid_argument("expected an integer from -3e9 to 3e9");
    return number.get<long long>() * number.get<long long>();
}

json shout(const json& data) {
    auto text = data.get<std::string>();
    for (char& letter : text) letter = 'a' <= letter && letter <= 'z' ? letter - 'a' + 'A' : letter;
    return text;
}

const std::map<std::string, json (*)(const json&)> services{{"square", square}, {"shout", shout}};

json decode(const Bytes& data, const std::string& codec) {
    if (codec == "json") return json::parse(data);
    if (codec == "msgpack") return json::from_msgpack(data);
    if (codec == "text" || codec == "") return std::string(data.begin(), data.end());
    throw std::invalid_argument("this worker does not know the codec " + codec);
}

Bytes encode(const json& value, const std::string& codec) {
    if (codec == "msgpack") return json::to_msgpack(value);
    const auto text = codec != "json" && value.is_string() ? value.get<std::string>() : value.dump();
    return {text.begin(), text.end()};
}

json run(const json& job) {  // seq, id, data, codec, shared, buffers, segment, service
    const auto start = Clock::now();
    const std::string codec = job.size() > 3 ? job[3] : "", service = job.size() > 7 ? job[7] : "";
    try {
        const auto target = service.empty() ? services.begin()->second : services.at(service);
        const auto answer = encode(target(decode(job.at(2).get_binary(), codec)), codec);
        const std::chrono::duration<double> seconds = Clock::now() - start;
        return {job.at(0), true, json::binary(answer), codec, seconds.count()};
    } catch (const std::exception& error) {
        return {job.at(0), false, json::binary(encode(error.what(), "text")), "text"};
    }
}

std::string machine() {  // by this a master on the same host notices at once that we have died
    char text[256] = "";
    gethostname(text, sizeof text - 1);
    std::string machine = text, boot;
    if (std::ifstream("/proc/sys/kernel/random/boot_id") >> boot) machine += " " + boot;
    for (const char* link : {"/proc/self/ns/pid", "/proc/self/ns/mnt"})
        if (auto size = readlink(link, text, sizeof text); size > 0) machine += " " + std::string(text, size);
    return machine;
}

struct Channel {  // a socket, and what happens to its connection
    zmq::socket_t socket, events;
    Channel(zmq::context_t& context, const char* watch, const std::string& name, const std::string& endpoint)
        : socket(context, ZMQ_DEALER), events(context, ZMQ_PAIR) {
        socket.set(zmq::sockopt::routing_id, name);
        socket.set(zmq::sockopt::linger, 0);
        socket.set(zmq::sockopt::sndtimeo, 1000);  // the other side may never come back
        if (endpoint.rfind("tcp:", 0) == 0) prepare_for_tcp(socket);
        zmq_socket_monitor(socket.handle(), watch, ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED);
        events.connect(watch);
    }
    ~Channel() { zmq_socket_monitor(socket.handle(), nullptr, 0); }
    bool send(const json& message) { return !!socket.send(zmq::buffer(json::to_msgpack(message))); }
    json receive() {  // buffers, which no JobRunner sends, would be dropped like other rubbish
        zmq::message_t frame;
        return socket.recv(frame) ? json::from_msgpack(frame.to_string()) : json();
    }
    int event() {  // its number, a native 16-bit integer, then a frame with an address
        zmq::message_t number, address;
        return events.recv(number) && events.recv(address) ? *number.data<std::uint16_t>() : 0;
    }
};

// Work for one master, until it is lost (true) or this worker leaves (false).
bool serve(const std::string& endpoint, int signals, Milliseconds patience, Clock::time_point& deadline) {
    zmq::context_t context;
    std::string name, text = machine();
    for (std::random_device random; name.size() < 32;) name += "0123456789abcdef"[random() % 16];
    Channel control(context, "inproc://control", name, endpoint), work(context, "inproc://work", name, endpoint);
    control.socket.set(zmq::sockopt::immediate, true);  // queue nothing for a master that is not there
    control.socket.connect(endpoint);
    json hello{"Hello", 1, name, getpid(), text.substr(0, text.find(' ')), text, nullptr, nullptr, "", json::array()};
    for (const auto& [service, _] : services) hello.back().push_back(service);
    bool greeted = false, welcomed = false, leaving = false;
    while (!leaving) try {
        if (welcomed) deadline = Clock::now() + patience;
        const auto left = std::max(std::chrono::ceil<Milliseconds>(deadline - Clock::now()), Milliseconds(0));
        zmq::pollitem_t items[]{{nullptr, signals, ZMQ_POLLIN, 0}, {control.events, 0, ZMQ_POLLIN, 0},
            {work.events, 0, ZMQ_POLLIN, 0}, {control.socket, 0, ZMQ_POLLIN, 0}, {work.socket, 0, ZMQ_POLLIN, 0}};
        if (!zmq::poll(items, 5, left) && !welcomed)
            throw std::runtime_error("no master at " + endpoint + " took this worker in time");
        leaving = items[0].revents;
        if (items[1].revents && control.event() == ZMQ_EVENT_HANDSHAKE_SUCCEEDED) greeted = control.send(hello);
        else if (items[1].revents && greeted) return true;
        if (items[2].revents && work.event() == ZMQ_EVENT_DISCONNECTED) return true;
        if (items[3].revents) {
            const json message = control.receive();
            const std::string kind = message.at(0);
            if (kind == "Welcome" && !welcomed) {
                if (message.at(1) != 1) throw std::runtime_error("the master speaks another version");
                work.socket.connect(message.at(2).get<std::string>());
                welcomed = work.send({"Ready", name});
            }
            if (kind == "Refused") throw std::runtime_error("the master refused: " + message.at(1).get<std::string>());
            if (kind == "Expelled") return true;  // "Die" would be heard only when the job has ended
            if (kind == "Drain") leaving = true;
        }
        if (items[4].revents) {
            json message = work.receive(), results = json::array();
            for (const json& job : message.at(2)) results.push_back(run(job));
            if (!results.empty() && !work.send({"Results", 0, results})) return true;
        }
    } catch (const json::exception&) {}  // a message that is none is dropped
    if (welcomed && work.send({"Goodbye"})) work.socket.set(zmq::sockopt::linger, 1000);
    return false;
}

int main(int argc, char** argv) try {
    if (argc < 2) throw std::runtime_error("usage: worker ENDPOINT [PATIENCE in seconds]");
    const auto patience = Milliseconds(argc > 2 ? std::stol(argv[2]) * 1000 : 60000);
    auto deadline = Clock::now() + patience;  // for the next Welcome
    sigset_t stops;  // blocked, so that they are read between two jobs
    sigemptyset(&stops), sigaddset(&stops, SIGTERM), sigaddset(&stops, SIGINT);
    sigprocmask(SIG_BLOCK, &stops, nullptr);
    const int signals = signalfd(-1, &stops, 0);
    while (serve(argv[1], signals, patience, deadline)) {}
} catch (const std::exception& error) {
    std::cerr << "worker: " << error.what() << std::endl;
    return 1;
}
