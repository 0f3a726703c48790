// What a socket needs for tcp. Keys are in the folder that $ZMQEXECUTOR_KEYS names, in the files
// master.public and worker.secret.
#pragma once
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <zmq.hpp>

inline std::string read_key(const std::string& path) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);)
        if (line.size() == 40 && line[0] != '#') return line;
    throw std::runtime_error(path + " has no key: expected a line of 40 characters");
}

inline void prepare_for_tcp(zmq::socket_t& socket) {
    socket.set(zmq::sockopt::heartbeat_ivl, 10'000);  // notices that the master's host is gone
    socket.set(zmq::sockopt::heartbeat_timeout, 60'000);
    const char* folder = std::getenv("ZMQEXECUTOR_KEYS");
    if (!folder || !*folder) return;
    const std::string secret = read_key(std::string(folder) + "/worker.secret");
    char own[41];
    if (zmq_curve_public(own, secret.c_str()) != 0)
        throw std::runtime_error("no keys: worker.secret is none, or this libzmq has no CURVE");
    socket.set(zmq::sockopt::curve_serverkey, read_key(std::string(folder) + "/master.public"));
    socket.set(zmq::sockopt::curve_publickey, own);
    socket.set(zmq::sockopt::curve_secretkey, secret);
}
