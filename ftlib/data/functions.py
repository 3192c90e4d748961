"""What a function is, and the two catalogues written by hand: natural (to fine-tune on) and unseen (in no training).

Each function has at least one free argument (`Argument.kind`): closed choices, such as a unit or a bool,
appear in every split, so only free values can be held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ftlib.data.values import Value


@dataclass(frozen=True)
class Argument:
    """A typed argument: free values of a `kind` (a pool of ftlib.data.values) or closed `choices`.

    `choices` maps each value to the words that say it in a question.
    """

    name: str
    kind: str = ""
    choices: Mapping[Value, str] | None = None


@dataclass(frozen=True)
class Function:
    """A function: its arguments in order, and question phrasings with every argument as `{name}`."""

    name: str
    arguments: tuple[Argument, ...]
    phrasings: tuple[str, ...]


def _free(name: str, kind: str) -> Argument:
    return Argument(name, kind=kind)


def _one_of(name: str, *values: Value) -> Argument:
    return Argument(name, choices={value: str(value) for value in values})


def _yes_no(name: str, yes: str, no: str) -> Argument:
    return Argument(name, choices={True: yes, False: no})


def _function(name: str, arguments: list[Argument], *phrasings: str) -> Function:
    return Function(name, tuple(arguments), phrasings)


_CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD", "SEK", "NOK", "INR", "BRL", "MXN")
_LANGUAGES = ("French", "German", "Spanish", "Italian", "Turkish", "Japanese", "Polish", "Swahili")


@cache
def natural() -> tuple[Function, ...]:
    """Everyday functions to fine-tune on."""
    return (
        _function(
            "get_current_weather",
            [_free("location", "city"), _one_of("unit", "celsius", "fahrenheit")],
            "What is the weather like in {location} in {unit}?",
            "How warm is it in {location} right now, in degrees {unit}?",
            "Tell me the current weather for {location}, use {unit}.",
            "I am flying to {location}. What is the temperature there in {unit}?",
            "Give me today's weather in {unit} for {location}.",
            "Do I need a coat in {location}? Answer in {unit}.",
            "Weather in {location}, {unit} please.",
            "Using {unit}, how hot is it in {location}?",
        ),
        _function(
            "currency_conversion",
            [_free("amount", "amount"), _one_of("from", *_CURRENCIES), _one_of("to", *_CURRENCIES)],
            "Convert {amount} {from} to {to}",
            "How much is {amount} {from} in {to}?",
            "What do I get in {to} for {amount} {from}?",
            "I have {amount} {from} and need {to}. How much is that?",
            "Change {amount} {from} into {to}, please.",
            "Exchange {from} for {to}: {amount}",
        ),
        _function(
            "book_flight",
            [_free("origin", "city"), _free("destination", "city"), _free("date", "date")],
            "Book a flight from {origin} to {destination} on {date}.",
            "I want to fly to {destination} from {origin} on {date}.",
            "On {date} I have to get from {origin} to {destination} by plane.",
            "Find me a seat to {destination}, leaving {origin} on {date}.",
            "Please reserve a plane ticket for {date}, {origin} to {destination}.",
        ),
        _function(
            "set_alarm",
            [_free("time", "time"), _yes_no("snooze", "snooze on", "snooze off")],
            "Wake me at {time} with {snooze}.",
            "Set an alarm for {time}, {snooze}.",
            "I must get up at {time}, {snooze} please.",
            "Alarm with {snooze} at {time} please",
            "Can you wake me up with {snooze}? At {time}.",
            "Please ring, {snooze}, when it is {time}.",
        ),
        _function(
            "create_reminder",
            [_free("task", "errand"), _free("date", "date"), _one_of("priority", "low", "normal", "high")],
            "Remind me to {task} on {date}, {priority} priority.",
            "On {date} I have to {task}. Make it a {priority} priority reminder.",
            "Don't let me forget to {task} on {date} ({priority} priority).",
            "Add a {priority} priority reminder for {date}: {task}",
            "I need to {task} by {date}, this has {priority} priority.",
        ),
        _function(
            "send_message",
            [_free("recipient", "person"), _free("text", "errand"), _one_of("app", "email", "sms", "chat")],
            "Tell {recipient} to {text}, send it by {app}.",
            "Send {recipient} a message by {app}: {text}",
            "By {app}, ask {recipient} to {text}.",
            "Write to {recipient} by {app} and say: {text}",
            "Could you let {recipient} know by {app}: {text}",
        ),
        _function(
            "play_music",
            [_free("title", "title"), _free("artist", "person"), _one_of("room", "kitchen", "bedroom", "garden")],
            "Play {title} by {artist} in the {room}.",
            "I want to hear the album {title} from {artist} in the {room}.",
            "Put on {artist}'s record {title}, {room} please.",
            "In the {room}, please play me {artist} with {title}.",
            "Start {title} in the {room}, the one by {artist}.",
        ),
        _function(
            "calculate_tip",
            [_free("bill", "cents"), _free("percent", "small")],
            "What is a {percent} percent tip on a bill of {bill}?",
            "The bill is {bill}. How much is a tip of {percent} percent?",
            "Work out {percent}% tip for {bill}.",
            "We paid {bill} for dinner and want to tip {percent} percent.",
            "Add a tip of {percent}% to {bill} please.",
        ),
        _function(
            "get_stock_price",
            [_free("symbol", "ticker"), _free("date", "date")],
            "What was the price of {symbol} on {date}?",
            "How much did one {symbol} share cost on {date}?",
            "Look up the stock {symbol} for {date}.",
            "On {date}, where did {symbol} close?",
            "Show me {symbol} shares as of {date}.",
        ),
        _function(
            "translate_text",
            [_free("text", "errand"), _one_of("language", *_LANGUAGES)],
            "Translate '{text}' into {language}.",
            "How do you say '{text}' in {language}?",
            "What is '{text}' in {language}?",
            "I need '{text}' in {language} please",
            "Put this into {language}: '{text}'",
        ),
        _function(
            "log_run",
            [_free("distance_km", "tenths"), _free("minutes", "small"), _one_of("surface", "road", "trail", "track")],
            "I ran {distance_km} km on the {surface} in {minutes} minutes.",
            "Note a {surface} run: {minutes} minutes, {distance_km} km.",
            "It took me {minutes} minutes to run {distance_km} km on the {surface}.",
            "Add {distance_km} km of {surface} running, time {minutes} minutes.",
            "After {minutes} minutes on the {surface} I had run {distance_km} km.",
        ),
        _function(
            "find_restaurant",
            [
                _free("city", "city"),
                _one_of("cuisine", "Thai", "Indian", "Greek", "Mexican", "Korean"),
                _free("time", "time"),
            ],
            "Find a {cuisine} restaurant in {city} that is open at {time}.",
            "Where can I eat {cuisine} food in {city}? I am there at {time}.",
            "I am hungry for {cuisine} in {city} at {time}.",
            "It is {time}. Show {cuisine} places in {city}.",
            "Which {cuisine} kitchen in {city} has a table at {time}?",
        ),
        _function(
            "track_package",
            [_free("tracking_number", "code"), _one_of("carrier", "DHL", "UPS", "FedEx")],
            "Where is my {carrier} package {tracking_number}?",
            "Track {tracking_number} with {carrier}.",
            "{carrier} sent me {tracking_number}, when does it arrive?",
            "Has parcel {tracking_number} from {carrier} been delivered?",
            "Status of {carrier} shipment {tracking_number} please",
        ),
        _function(
            "schedule_meeting",
            [_free("attendee", "person"), _free("time", "time"), _free("minutes", "small")],
            "Set up a meeting with {attendee} at {time} for {minutes} minutes.",
            "I need {minutes} minutes with {attendee} at {time}.",
            "At {time}, block {minutes} minutes to meet {attendee}.",
            "Schedule a {minutes} minute call with {attendee}, starting {time}.",
            "Can {attendee} meet me at {time}? It takes {minutes} minutes.",
        ),
    )


@cache
def unseen() -> tuple[Function, ...]:
    """Functions like the natural ones that no training sees."""
    return (
        _function(
            "book_hotel",
            [
                _free("city", "city"),
                _free("nights", "small"),
                _yes_no("breakfast", "with breakfast", "without breakfast"),
            ],
            "Book a hotel in {city} for {nights} nights {breakfast}.",
            "I stay {nights} nights in {city}, {breakfast}.",
            "Find me a room {breakfast} in {city} for {nights} nights.",
            "We need {nights} nights {breakfast}. The city is {city}.",
        ),
        _function(
            "calculate_bmi",
            [_free("weight_kg", "tenths"), _free("height_cm", "count")],
            "I weigh {weight_kg} kg and am {height_cm} cm tall. What is my BMI?",
            "What is the body mass index for {height_cm} cm and {weight_kg} kg?",
            "BMI of someone with {weight_kg} kg at {height_cm} cm?",
            "Work out my BMI: {height_cm} cm tall, weight {weight_kg} kg.",
        ),
        _function(
            "search_trains",
            [
                _free("destination", "city"),
                _one_of("seat", "first class", "second class"),
                _free("departure_date", "date"),
            ],
            "Show {seat} trains to {destination} on {departure_date}.",
            "Which {seat} seats are there to {destination} for {departure_date}?",
            "On {departure_date} I travel to {destination} in {seat}. Which trains are there?",
            "Search for trains, {seat}, {destination}, {departure_date}.",
        ),
    )
